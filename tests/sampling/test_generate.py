from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.io.images import png_bytes, read_png
from ldm.sampling.generate import Item, Manifest, first_words, generate, make_items, prompt_items, read_manifest

ITEMS = prompt_items(["a red heart", 'an "owl", näive\nstyle', "a cat"], samples=3, seed=42)
SETTINGS = {"scale": 7.5, "keys": [0, 1, 2], "weights": "abc"}


def colour(item: Item) -> tuple[int, int, int]:
    return item.seed[0], item.prompt_index, item.sample


class Maker:
    """Makes images whose colour is their item; stops after `limit` batches as if killed."""

    def __init__(self, limit: int = 10**6):
        self.batches: list[list[Item]] = []
        self.limit = limit

    def __call__(self, items):
        if len(self.batches) >= self.limit:
            raise KeyboardInterrupt
        self.batches.append(list(items))
        return [Image.new("RGB", (4, 4), colour(item)) for item in items], {"seconds": 0.5}


def run(folder, items=ITEMS, settings=SETTINGS, maker=None, **options):
    maker = maker or Maker()
    return list(generate(items, maker, settings, folder, **options)), maker


def state(folder):
    return {
        p.relative_to(folder).as_posix(): (p.stat().st_mtime_ns, p.read_bytes())
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_every_item_becomes_a_file_with_its_settings_and_a_line(tmp_path):
    made, maker = run(tmp_path, batch=4)
    assert [len(b) for b in maker.batches] == [4, 4, 1]
    assert [m.item for m in made] == ITEMS and all(m.fresh for m in made)
    assert len({m.path for m in made}) == 9
    for m in made:
        image, settings, how = read_png(m.path)
        assert image.getpixel((0, 0)) == colour(m.item) and how["seconds"] == 0.5
        assert settings == m.item.settings() | SETTINGS
        words, place = first_words(m.item.caption), f"{m.item.prompt_index:05d}-{m.item.sample:03d}"
        assert m.path.name.startswith(f"{words}-42-{place}-")
    entries = read_manifest(tmp_path / "manifest.jsonl")
    assert [e["file"] for e in entries] == [m.path.relative_to(tmp_path).as_posix() for m in made]
    assert entries[4].items() >= {"prompt": ITEMS[4].caption, "scale": 7.5, "seconds": 0.5}.items()


def test_a_second_run_makes_nothing_and_touches_no_file(tmp_path):
    first, _ = run(tmp_path)
    before = state(tmp_path)
    second, maker = run(tmp_path, batch=5)
    assert maker.batches == [] and state(tmp_path) == before
    assert [(m.item, m.path) for m in second] == [(m.item, m.path) for m in first]
    assert not any(m.fresh for m in second) and second[3].run == first[3].run


@given(stop=st.integers(0, 9), first=st.integers(1, 4), second=st.integers(1, 4))
def test_a_killed_run_resumes_to_the_same_files(tmp_path_factory, stop, first, second):
    folder, whole = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("whole")
    try:
        run(folder, batch=first, maker=Maker(limit=stop))
    except KeyboardInterrupt:
        pass
    kept = state(folder)
    _, maker = run(folder, batch=second)
    run(whole)
    # A batch of which a image is missing is made whole.
    assert sum(map(len, maker.batches)) == (9 - stop * first // second * second if stop * first < 9 else 0)
    images = [{n: b for n, (_, b) in state(f).items() if n != "manifest.jsonl"} for f in (folder, whole)]
    assert images[0] == images[1]
    assert all(state(folder)[n] == kept[n] for n in kept if n != "manifest.jsonl")
    assert len(read_manifest(folder / "manifest.jsonl")) == 9


def test_a_crash_in_mid_line_does_not_break_the_manifest(tmp_path):
    run(tmp_path, items=ITEMS[:4])
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-25])
    made, maker = run(tmp_path)
    assert [len(b) for b in maker.batches] == [1] * 5
    listed = {e["file"] for e in read_manifest(manifest)}
    assert listed == {m.path.relative_to(tmp_path).as_posix() for m in made}
    lines = manifest.read_text().splitlines()
    assert len(lines) == 10
    with pytest.raises(json.JSONDecodeError):
        json.loads(lines[3])


def test_a_image_without_a_line_gets_one_and_a_broken_image_is_made_again(tmp_path):
    made, _ = run(tmp_path)
    (tmp_path / "manifest.jsonl").unlink()
    made[2].path.write_bytes(made[2].path.read_bytes()[:60])
    again, maker = run(tmp_path)
    assert maker.batches == [[ITEMS[2]]] and read_png(made[2].path) is not None
    assert len(read_manifest(tmp_path / "manifest.jsonl")) == 9


def test_a_file_is_only_trusted_if_its_own_settings_agree(tmp_path):
    made, _ = run(tmp_path)
    made[0].path.replace(made[1].path)
    _, maker = run(tmp_path)
    assert maker.batches == [[ITEMS[0]], [ITEMS[1]]]


@pytest.mark.parametrize("change", ["pixels", "run", "proof"])
def test_a_image_that_was_changed_is_made_again_and_said(tmp_path, change):
    made, _ = run(tmp_path)
    whole = made[3].path.read_bytes()
    image, kept, how = read_png(made[3].path)
    if change == "pixels":
        image.putpixel((0, 0), (1, 2, 3))
    how = {"run": how | {"seconds": "many"}, "proof": {"seconds": 0.5}}.get(change, how)
    made[3].path.write_bytes(png_bytes(image, kept, how))
    again, maker = run(tmp_path)
    assert maker.batches == [[ITEMS[3]]] and [m.item for m in again if m.replaced] == [ITEMS[3]]
    assert made[3].path.read_bytes() == whole and len(read_manifest(tmp_path / "manifest.jsonl")) == 9


def test_two_equal_runs_at_once_list_each_image_once(tmp_path):
    """One has looked for images and found none when the other makes them all."""
    maker = Maker()

    def slow(items):
        if not maker.batches:
            run(tmp_path)
        return maker(items)

    made, _ = run(tmp_path, maker=slow)
    assert all(m.fresh and not m.replaced for m in made) and len(made) == len(ITEMS)
    assert sorted(e["file"] for e in read_manifest(tmp_path / "manifest.jsonl")) == sorted(
        f"samples/{path.name}" for path in (tmp_path / "samples").iterdir()
    )
    assert all(not m.replaced for m in run(tmp_path)[0])


@pytest.mark.parametrize("lines", ['{"file": ["a"]}', "[1]", '{"file": {}}', '"x"', "[" * 50_000, "\udcff"])
def test_lines_that_are_none_of_a_manifest_are_skipped(tmp_path, lines):
    (tmp_path / "manifest.jsonl").write_bytes(lines.encode(errors="surrogateescape") + b'\n{"file": "b"}\n')
    assert read_manifest(tmp_path / "manifest.jsonl") == [{"file": "b"}]
    run(tmp_path)
    assert len(read_manifest(tmp_path / "manifest.jsonl")) == 10


def test_lines_that_one_process_adds_stay_when_another_removes_some(tmp_path):
    """Two runs at once, one of which makes its images again."""
    path = tmp_path / "manifest.jsonl"
    one = Manifest(path)
    for file in ("a", "b", "c"):
        one.add(file, {})
    other = Manifest(path)
    other.remove({"a", "c"})
    one.add("d", {})
    other.add("a", {})
    other.add("d", {})
    assert [entry["file"] for entry in read_manifest(path)] == ["b", "d", "a"]
    Manifest(tmp_path / "none.jsonl").remove({"a"})
    assert not (tmp_path / "none.jsonl").exists()


def test_a_manifest_that_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "manifest.jsonl")
    with pytest.raises(OSError, match="a FIFO"):
        run(tmp_path)


@pytest.mark.parametrize("change", [{"scale": 5.0}, {"keys": [0]}, {"weights": "abd"}])
def test_other_settings_make_other_files_and_keep_these(tmp_path, change):
    run(tmp_path)
    before = state(tmp_path)
    _, maker = run(tmp_path, settings=SETTINGS | change)
    assert len(maker.batches) == 9
    after = state(tmp_path)
    assert len(after) == len(before) + 9
    assert all(after[n] == before[n] for n in before if n != "manifest.jsonl")


def test_another_prompt_in_the_same_place_is_another_image(tmp_path):
    run(tmp_path, items=prompt_items(["a cat"], 1, 42))
    _, maker = run(tmp_path, items=prompt_items(["a dog"], 1, 42))
    assert len(maker.batches) == 1 and len(list((tmp_path / "samples").iterdir())) == 2


@settings(max_examples=25)
@given(stops=st.lists(st.integers(0, 4), max_size=4), batch=st.integers(1, 5), world_size=st.integers(1, 4))
def test_every_image_is_made_among_the_same_others(tmp_path_factory, stops, batch, world_size):
    """Whatever was stopped, and over however many machines: what a batched network's last digits depend on."""
    folder, batches = tmp_path_factory.mktemp("shared"), []
    for rank, stop in [*enumerate(stops), *((rank, 10**6) for rank in range(world_size))]:
        maker = Maker(stop)
        try:
            run(folder, maker=maker, batch=batch, rank=rank % world_size, world_size=world_size)
        except KeyboardInterrupt:
            pass
        batches += maker.batches
    whole = [ITEMS[first : first + batch] for first in range(0, 9, batch)]
    assert all(b in whole for b in batches) and all(b in batches for b in whole)
    assert len(read_manifest(folder / "manifest.jsonl")) == 9


def test_of_a_batch_that_is_made_again_only_the_missing_are_saved(tmp_path):
    made, _ = run(tmp_path, batch=3)
    made[4].path.unlink()
    before = state(tmp_path)
    again, maker = run(tmp_path, batch=3)
    assert maker.batches == [ITEMS[3:6]]
    assert [m.item for m in again if m.fresh] == [ITEMS[4]] and len(again) == 9
    after = state(tmp_path)
    assert all(after[name] == before[name] for name in before if name != "manifest.jsonl")


@given(world_size=st.integers(1, 12))
def test_ranks_share_the_work_without_overlap(world_size):
    shares = [run(None, rank=rank, world_size=world_size)[0] for rank in range(world_size)]
    assert sorted((m.item.prompt_index, m.item.sample) for share in shares for m in share) == [
        (i.prompt_index, i.sample) for i in ITEMS
    ]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_nothing_is_saved_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, _ = run(None, batch=3)
    assert len(made) == 9 and all(m.path is None and m.fresh for m in made) and list(tmp_path.iterdir()) == []


def test_images_appear_as_they_are_made(tmp_path):
    images = generate(ITEMS, Maker(), SETTINGS, tmp_path)
    next(images), next(images)
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_starting_noise_can_be_shared():
    items = prompt_items(["a", "b"], samples=4, seed=7, share_start=2)
    assert [i.start for i in items] == [(7, 0), (7, 1)] * 4
    assert len({i.seed for i in items}) == 8
    assert all(i.start == i.seed for i in ITEMS)


# Where the noise of a image comes from


def seeds(*prompts: str, samples: int = 2, **options) -> dict[tuple[str, int], list[tuple[int, ...]]]:
    """The seeds of each prompt's samples, in the order of the list."""
    found: dict[tuple[str, int], list[tuple[int, ...]]] = {}
    for item in prompt_items(prompts, samples, 42, **options):
        found.setdefault((item.caption, item.sample), []).append(item.seed)
    return found


@given(data=st.data())
def test_noise_does_not_depend_on_the_order_of_the_list_nor_on_what_else_is_in_it(data):
    prompts = data.draw(st.lists(st.sampled_from(["a cat", "a dog", "an owl", "", "\u732b"]), min_size=1, max_size=8))
    other = data.draw(st.permutations(prompts))
    assert seeds(*prompts) == seeds(*other)
    more = seeds(*other, "a tree")
    assert all(more[key] == own for key, own in seeds(*prompts).items())
    every = [seed for own in more.values() for seed in own]
    assert len(set(every)) == len(every)  # also of a prompt that is listed twice


def test_the_seed_of_a_prompt_never_changes():
    assert prompt_items(["a red heart, noto style"], 1, 42)[0].seed == (42, 1227200122, 1849923446, 0, 0)


def test_noise_by_place_is_that_of_earlier_versions():
    assert seeds("a cat", "a dog", "a cat", by_position=True) == {
        ("a cat", 0): [(42, 0, 0), (42, 2, 0)],
        ("a cat", 1): [(42, 0, 1), (42, 2, 1)],
        ("a dog", 0): [(42, 1, 0)],
        ("a dog", 1): [(42, 1, 1)],
    }


def test_noise_of_a_file_comes_from_its_content_and_of_nothing_from_the_sample_alone():
    one, renamed, other = (
        make_items([{"image": name, "image_sha256": digest, "prompt": name}], 1, 42)[0].seed
        for name, digest in (("a.png", "12ab"), ("b.png", "12ab"), ("a.png", "34cd"))
    )
    assert one == renamed != other
    assert [item.seed for item in make_items([{}], 2, 42)] == [(42, 0, 0), (42, 0, 1)]


# Names of files


@pytest.mark.parametrize(
    "text, words",
    [
        ("a red heart, noto style", "a-red-heart-noto-style"),
        ("../../etc/passwd", "etc-passwd"),
        ("C:\\a|b?*", "c-a-b"),
        ("\u732b \u306e \u7d75", "\u732b-\u306e-\u7d75"),
        ("\u0915\u0941\u0924\u094d\u0924\u093e",) * 2,
        ("cafe\u0301", "caf\u00e9"),
        ("", ""),
        ("\u2764\ufe0f !", ""),
        (".hidden", "hidden"),
        ("x" * 300, "x" * 40),
        ("one two three four five six seven eight nine", "one-two-three-four-five-six-seven-eight"),
    ],
)
def test_a_file_name_begins_with_the_first_words(text, words):
    assert first_words(text) == words


@given(text=st.text())
def test_every_text_makes_a_name_that_a_file_system_takes(text, tmp_path_factory):
    words = first_words(text)
    assert len(words) <= 40 and not words.startswith(("-", ".")) and not words.endswith("-")
    assert not set(words) & set('/\\:*?"<>|\0\n') and len(words.encode()) <= 160


@pytest.mark.parametrize(
    "options, why",
    [
        ({"batch": 0}, "batch"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"rank": -1}, "rank"),
        ({"world_size": 0}, "rank"),
    ],
)
def test_bad_arguments_say_why(options, why):
    with pytest.raises(ValueError, match=why):
        run(None, **options)
