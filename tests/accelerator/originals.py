"""The originals beside bitgen: the same synthetic weights of real size, in turns, bfloat16."""

from collections.abc import Iterator
from typing import Any

import side_by_side

from .part import READY, Context

# Where the checkout has its packages.
FOLDERS = {"bitdance": "BitDance/imagenet_gen", "bigr": "BiGR"}
# An eager B-1x of 100 head steps would take most of the time there is.
STEPS = {"bitdance_B_1x": 20}
# Seconds for compiling the original: as long as the checks of a round take on an H100. BitDance's
# were not done after 170 there.
PATIENCE = 120.0


def beside(name: str, context: Context) -> Iterator[Any]:
    """Eager original, compiled original and bitgen; in a rehearsal eager alone, in few steps."""
    if context.originals is None:
        yield {"what": name, "left_out": "--originals names no folder with its code"}
        return
    folder = context.originals / FOLDERS[name.split("_")[0]]
    if not folder.is_dir():
        yield {"what": name, "left_out": f"its code is not in {folder}"}
        return
    steps, rounds = STEPS.get(name, 100), 3
    kinds, dtype = ("original", "compiled", "bitgen"), "bfloat16"
    if context.rehearse:
        # bfloat16 is slow on a CPU, and so is compiling for it.
        steps, rounds, kinds, dtype = 1, 1, ("original", "bitgen"), "float32"
    arguments = [name, f"--reference={folder}", f"--steps={steps}", f"--rounds={rounds}"]
    arguments.append(f"--dtype={dtype}")
    with side_by_side.ready_workers(arguments, kinds, PATIENCE) as workers:
        yield READY
        if set(workers) != set(kinds):
            yield {"what": "the compiled original", "holds": False, "ended": "log.txt says why"}
        for row in side_by_side.take_turns(workers, side_by_side.parse(arguments)):
            yield {**row, "steps": steps}
