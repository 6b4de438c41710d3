"""Timing of several methods."""

from __future__ import annotations

from functools import partial

from evaluation.plots.timeline import measure


def test_methods_take_turns_after_one_untimed_run_of_each():
    calls = []

    def method(name: str, items: list) -> tuple[list, dict[str, float]]:
        calls.append(name)
        return [], {"seconds": len(calls)}

    seconds = measure({name: partial(method, name) for name in "ab"}, [], 2)
    assert calls == [*"ab" * 3] and seconds == {"a": [3, 5], "b": [4, 6]}
