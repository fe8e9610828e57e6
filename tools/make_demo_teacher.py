"""Makes the demo teacher from nothing, and puts it where the package ships it.

    python tools/make_demo_teacher.py

The recipe is configs/demo_teacher.yaml: a Qwen3-shaped model of 1.8M parameters, trained from scratch on 60,000 worked
problems by the same stages that distil a student from it. The seed is fixed. The tool refuses to replace the teacher by
one that solves fewer than 97% of 512 held-out problems.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from jaxdistill import cli, hub
from jaxdistill.config import load
from jaxdistill.records import RunDir, read_manifest

CONFIG = Path(__file__).parent.parent / "configs" / "demo_teacher.yaml"
LEAST = 0.97
SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "README.md",
)


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="overrides a key of the recipe",
    )
    overrides = arguments.parse_args().overrides
    code = cli.main(["run", str(CONFIG), *(part for o in overrides for part in ("--set", o))])
    if code:
        return code
    run = RunDir(Path(load(CONFIG, overrides).run_dir))
    manifest = read_manifest(run.evaluation)
    assert manifest is not None
    accuracy = manifest["counts"]["models"]["student"]["accuracy"]
    if accuracy < LEAST:
        print(
            f"The new teacher solves {accuracy:.1%} of the held-out problems, less than {LEAST:.0%}: not shipped.",
            file=sys.stderr,
        )
        return 1
    target = hub.demo_teacher()
    target.mkdir(parents=True, exist_ok=True)
    for name in SHIPPED:
        shutil.copyfile(run.export / name, target / name)
    print(f"The new teacher solves {accuracy:.1%} of the held-out problems; it is in {target}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
