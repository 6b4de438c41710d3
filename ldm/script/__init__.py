"""What the sampling scripts share: the checks before a slow load, the run, its report.

A script says what is pictured: a list of items and a `Task`. Everything else is here or below.
"""

from ldm.script.inputs import from_picture, given_names, image_items, named, pixels, prompts_in, stacked, text_items
from ldm.script.model_files import fitting_configs, model_files
from ldm.script.recipe import (
    CPU_POSITIONS,
    count_nodes,
    make_plan,
    make_recipe,
    run_facts,
    uses_autocast,
)
from ldm.script.report import Result
from ldm.script.run import GO_ON, check_network, make_pictures
from ldm.script.setup import Setup, conditioner, make_setup, picture_size, without_weights

__all__ = ["CPU_POSITIONS", "GO_ON", "Result", "Setup", "check_network", "conditioner", "count_nodes",
           "fitting_configs", "from_picture", "given_names", "image_items", "make_pictures", "make_plan", "make_recipe",
           "make_setup", "model_files", "named", "picture_size", "pixels", "prompts_in", "run_facts", "stacked",
           "text_items", "uses_autocast", "without_weights"]
