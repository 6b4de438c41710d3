"""What the sampling scripts share: the checks before a slow load, the run, its report.

A script says what is pictured: a list of items and a `Task`. Everything else is here or below.
"""

from ldm.script.inputs import (
    from_picture,
    given_names,
    image_items,
    in_size,
    named,
    pixels,
    prompts_in,
    stacked,
    text_items,
)
from ldm.script.model_files import fitting_configs, how_to_get, model_files
from ldm.script.recipe import (
    CPU_POSITIONS,
    count_nodes,
    make_plan,
    make_recipe,
    run_facts,
    uses_autocast,
    with_batches,
)
from ldm.script.report import Result
from ldm.script.run import GO_ON, check_amount, check_guidance, check_network, make_pictures, what_is_cut
from ldm.script.setup import Setup, check_outdir, check_output, make_setup, picture_size, read_setup
from ldm.script.tasks import (
    CLASS_NAMES,
    class_task,
    depth_task,
    inpainting_task,
    label_task,
    layout_task,
    settle_upscaling,
    upscaling_task,
)

__all__ = ["CLASS_NAMES", "CPU_POSITIONS", "GO_ON", "Result", "Setup", "check_amount", "check_guidance",
           "check_network", "check_outdir", "check_output", "class_task", "count_nodes", "depth_task",
           "fitting_configs", "from_picture", "given_names", "how_to_get", "image_items", "in_size", "inpainting_task",
           "label_task", "layout_task", "make_pictures", "make_plan", "make_recipe", "make_setup", "model_files",
           "named", "picture_size", "pixels", "prompts_in", "read_setup", "run_facts", "settle_upscaling", "stacked",
           "text_items", "upscaling_task", "uses_autocast", "what_is_cut", "with_batches"]
