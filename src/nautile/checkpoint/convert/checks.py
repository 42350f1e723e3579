"""What is looked at again before a conversion gets its name: its source, and the whole of what was written."""

from pathlib import Path

from nautile.checkpoint.convert import shards
from nautile.checkpoint.convert.manifest import Manifest, identity
from nautile.checkpoint.convert.options import Options
from nautile.checkpoint.convert.plan import Plan
from nautile.checkpoint.shard import ShardReader
from nautile.checkpoint.source import Checkpoint, open_checkpoint
from nautile.core.errors import NautileError


def check_source(checkpoint: Checkpoint, manifest: Manifest) -> None:
    """See that the source is what it was when the work began.

    Raises:
        NautileError: It is not.
    """
    if identity(checkpoint) != manifest.source:
        raise NautileError(
            f"{checkpoint.folder} has changed while it was read",
            "the result would be of neither its old nor its new state",
            "leave it as it is, and run the same command again",
        )


def check_whole(folder: Path, plan: Plan, options: Options) -> None:
    """Open the result as its readers will, and compare every name, dtype and shape with the plan.

    Raises:
        NautileError: They are not as planned.
    """
    for shard in plan.shards:
        with ShardReader(folder / shard.file) as reader:
            problem = shards.misfit(shard, reader)
        if problem:
            raise NautileError(f"{folder / shard.file}: {problem}", "it was right when written", "run it again")
    if options.to == "huggingface":
        with open_checkpoint(folder) as written:
            for name in written.weight_names():
                if problem := written.quantization_problem(name):
                    raise NautileError(f"{folder}: {problem}", "it was right when written", "run it again")
