"""SimpleITK's formats (.mha, .mhd, .nrrd), rewritten as NIfTI where SimpleITK is installed."""

from pathlib import Path

from core.scans.not_found import CONVERTED_SUFFIXES
from core.scans.volumes import NIFTI_SUFFIXES
from core.system.exits import one_line
from core.system.files import whole_file

IMAGE_SUFFIXES = (*NIFTI_SUFFIXES, *CONVERTED_SUFFIXES)


def is_other_format(path: Path) -> bool:
    """Return True for a file named like one of these formats."""
    return path.name.lower().endswith(CONVERTED_SUFFIXES)


def stem(path: Path) -> str:
    """Return a file's name without the suffix of an image."""
    name = path.name
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return path.stem


def check_readable(paths: list[Path]) -> None:
    """Check that SimpleITK is installed if any of the files needs it.

    Raises:
        ValueError: naming one of the files and what to install.
    """
    others = [path for path in paths if is_other_format(path)]
    if others:
        try:
            import SimpleITK  # noqa: F401
        except ImportError as error:
            raise ValueError(
                f"{others[0]}: {others[0].suffix} files ({len(others)}) are read with SimpleITK; pip install SimpleITK"
            ) from error


def write_as_nifti(path: Path, target: Path) -> None:
    """Write a file as NIfTI, whole, with its voxels and its place in the patient.

    Raises:
        ValueError: when SimpleITK cannot read it.
    """
    import SimpleITK as sitk

    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path}: cannot be read by SimpleITK ({one_line(error)})") from error
    with whole_file(target) as temporary:
        sitk.WriteImage(image, str(temporary), True)
