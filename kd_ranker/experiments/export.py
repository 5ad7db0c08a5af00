"""Writes a trained student, or the teacher of its own workdir, for a server without this project.

`docs/serving.md` says what the folder holds. For example:

    python -m experiments.export --workdir=runs/sweep --member=none-seed0 --out=served
"""

from kd_ranker.errors import UserError
from kd_ranker.pipeline import commands
from kd_ranker.pipeline.launch import launch_on_run
from kd_ranker.pipeline.remote import Place, local_folder

TAKES_CONFIG = False
FLAGS = {
    "out": ("", "the folder to write; it must not exist"),
    "member": ("", "the student of a sweep; without it, the best one on validation"),
    "serve": ("", "the serving choice; without it, distill.serve, or of a sweep the best"),
    "items": ("float32", "the type of item embeddings: float32, bfloat16 or int8"),
    "formats": ("jax,onnx", "the formats of the programs, with commas: jax, onnx"),
}


def main(workdir: Place, out: str, member: str, serve: str, items: str, formats: str) -> None:
    if not out:
        raise UserError("--out is missing; give a folder to write, which must not exist")
    folder = local_folder("--out", out)
    print(commands.export(workdir, folder, member, serve, items, tuple(formats.split(","))))
    print(f"export: {folder}")
    print(f"check it with: python {folder / 'check.py'}")


def start() -> None:
    launch_on_run(main, TAKES_CONFIG, **FLAGS)


if __name__ == "__main__":
    start()
