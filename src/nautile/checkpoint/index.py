"""Which files of a folder hold its weights: one, or several with an index that says which tensor is in which."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nautile.core.errors import UserError
from nautile.core.json_file import read_json_object


@dataclass(frozen=True)
class Kind:
    """File names under which weights of one format are published."""

    single: str
    index: str
    suffix: str


SAFETENSORS = Kind("model.safetensors", "model.safetensors.index.json", ".safetensors")
PICKLED = Kind("pytorch_model.bin", "pytorch_model.bin.index.json", ".bin")
_PURPOSE = "it tells which file holds which tensor"
_CURE = "copy or download the file again"


@dataclass(frozen=True)
class WeightFiles:
    """The files to read, and the index's tensor name → file name (empty for a single file)."""

    kind: Kind
    paths: list[Path]
    weight_map: dict[str, str]


def weight_files(folder: Path, allow_pickle: bool = False) -> WeightFiles:
    """Files that hold the folder's weights; safetensors where both formats are there, an index before a single file.

    Raises:
        UserError: It is no folder with weights, a file that the index names is missing, or the weights are pickled and
            `allow_pickle` is False.
    """
    names = _names(folder)
    for kind in (SAFETENSORS, PICKLED):
        if kind.index not in names and kind.single not in names:
            continue
        if kind is PICKLED and not allow_pickle:
            raise UserError(
                f"{folder}: the weights are pickled ({kind.single}), there are no safetensors",
                "a pickled file is a program that runs when it is read",
                "download the safetensors of this model, or, if you trust the file, pass --allow-pickle "
                "(allow_pickle=True): then only tensors are unpickled",
            )
        if kind.index in names:
            weight_map = read_index(folder / kind.index)
            return WeightFiles(kind, [folder / file for file in dict.fromkeys(weight_map.values())], weight_map)
        return WeightFiles(kind, [folder / kind.single], {})
    raise _no_weights(folder, names)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name → file name of an index whose files all lie beside it.

    Raises:
        UserError: As `weight_map_of`, or a file that it names is not there.
    """
    weight_map = weight_map_of(path)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (path.parent / file).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more are" if len(missing) > 3 else " is" if len(missing) == 1 else " are"
        raise UserError(
            f"{path.parent}: {', '.join(missing[:3])}{more} missing",
            f"{path.name} says that tensors are stored there",
            "copy or download the missing files into the folder",
        )
    return weight_map


def weight_map_of(path: Path) -> dict[str, str]:
    """Tensor name → file name, as the index says; whether the files are there is not asked.

    Raises:
        UserError: It is not such an index, names a tensor twice, or names a file that would lie elsewhere.
    """
    index = read_json_object(path, _PURPOSE, _CURE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _bad_index(path, "it has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file or "\\" in file or "\0" in file:
            raise _bad_index(path, f"{name} is said to be in {file!r}, which is not the name of a file beside it")
    return weight_map


def check_index(path: Path, weight_map: Mapping[str, str], held: Mapping[str, set[str]]) -> None:
    """Compare the index with what its files hold, file name → tensor names.

    Raises:
        UserError: Two files hold the same tensor, or a tensor is not where the index says.
    """
    found: dict[str, str] = {}
    for file, names in held.items():
        for name in names:
            if name in found:
                raise _bad_index(path, f"{name} is stored twice, in {found[name]} and in {file}")
            found[name] = file
    for name, file in weight_map.items():
        if found.get(name) != file:
            place = f"it is in {found[name]}" if name in found else "no file has it"
            raise _bad_index(path, f"{name} is said to be in {file}; {place}")


def _names(folder: Path) -> set[str]:
    if folder.is_file():
        raise UserError(
            f"{folder}: a file, not a folder",
            "a model is a folder with config.json and all files of its weights",
            f"name its folder: {folder.parent}",
        )
    try:
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be read ({error.strerror})",
            "a model is a folder with config.json and safetensors",
            "check the path and that you may read it",
        ) from error
    if not names:
        raise UserError(
            f"{folder}: an empty folder",
            "a model is a folder with config.json and safetensors",
            "name another one, such as runs/demo/model, or download the files into it",
        )
    return names


def _no_weights(folder: Path, names: set[str]) -> UserError:
    if shards := sorted(name for name in names if name.endswith(SAFETENSORS.suffix)):
        return UserError(
            f"{folder}: {shards[0]} but no {SAFETENSORS.single} and no {SAFETENSORS.index}",
            "of several files, the index says which tensors are in which one",
            f"copy or download {SAFETENSORS.index} into the folder",
        )
    return UserError(
        f"{folder}: no {SAFETENSORS.single} and no {SAFETENSORS.index}",
        "weights are read from safetensors",
        "name a folder with config.json and safetensors, such as runs/demo/model",
    )


def _bad_index(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}", _PURPOSE, _CURE)
