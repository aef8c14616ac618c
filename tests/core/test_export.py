"""A network as ONNX: the file alone, with onnxruntime, gives the label maps of infer.py."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from data_files import settings
from helpers import make_voxels, save_scan
from warm import run_script

from core.checkpoint import load_network, save_checkpoint
from core.export import export, main
from core.network import build_network
from core.scans.organ_names import read_network

ROOT = Path(__file__).resolve().parents[2]
ORGANS = ("background", "liver", "right kidney", "spleen")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Return a V-Net with random weights, whose classes all occur."""
    config = settings(
        size=(32, 32, 16), channels=2, down_convs=(1, 2), up_convs=(1,), organs=ORGANS, window_hu=(-100, 250)
    )
    torch.manual_seed(3)
    network = build_network(config)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    training_data = {
        "percentiles": [5, 50, 95],
        "extent_mm": {"min": [1, 1, 1], "max": [1e4, 1e4, 1e4]},
        "hu_percentiles": {"min": [-2e3] * 3, "max": [3e3] * 3},
    }
    save_checkpoint(path, network, config, training_data=training_data)
    return path


@pytest.mark.slow
def test_the_model_gives_the_label_map_of_infer_py_and_says_what_it_needs(checkpoint, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = tmp_path / "model.onnx"
    assert main([str(checkpoint), str(model)]) == 0
    assert capsys.readouterr() == (f"{model} written\n", "")
    session = onnxruntime.InferenceSession(model)
    facts = {key: json.loads(text) for key, text in session.get_modelmeta().custom_metadata_map.items()}
    network, _ = load_network(checkpoint)
    assert facts == {
        "orientation": "RAS+", "window_hu": [-100, 250], "size": [32, 32, 16], "crop": "none", "organs": list(ORGANS),
        "network": facts["network"],
    }  # fmt: skip
    image = torch.rand(1, 1, 32, 32, 16)
    with torch.inference_mode():
        expected = network(image)
    (logits,) = session.run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)

    # The second shrinks by more than 2 along each axis, where infer.py averages; the third grows by more than 2.
    for axes, shape in (("RAS", (44, 38, 21)), ("PIL", (90, 70, 45)), ("LAS", (44, 38, 6))):
        scan = save_scan(tmp_path / f"{axes}.nii.gz", make_voxels(shape), axes)
        out = tmp_path / f"{axes}_labels.nii.gz"
        said = run_script("docs/onnx_example.py", model, scan, out)
        run_script("infer.py", scan, "--checkpoint", checkpoint, "--output", tmp_path / "out").check_returncode()
        assert facts["network"] == read_network(tmp_path / "out" / f"{axes}.nii.gz")
        mine, its = nib.load(tmp_path / "out" / f"{axes}.nii.gz"), nib.load(out)
        assert np.array_equal(mine.affine, its.affine)
        labels, found = np.asarray(mine.dataobj), np.asarray(its.dataobj)
        for organ, name in enumerate(ORGANS):
            first, second = labels == organ, found == organ
            assert 2 * (first & second).sum() / (first.sum() + second.sum()) >= 0.999
            assert f"{organ} {name}: {second.sum()} voxels\n" in said.stdout


@pytest.mark.slow
def test_the_model_of_a_network_of_patches_takes_the_whole_grid(checkpoint, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, content = load_network(checkpoint)
    patched = tmp_path / "patched.pt"
    config = replace(content["config"], patch_size=(16, 32, 16))
    save_checkpoint(patched, network, config, training_data=content["training_data"])
    assert main([str(patched), str(tmp_path / "model.onnx")]) == 0
    image = torch.rand(1, 1, 32, 32, 16)
    with torch.inference_mode():
        expected = load_network(patched)[0](image)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_exported_is_refused(checkpoint, tmp_path, capsys, monkeypatch):
    def refused(*arguments: Path) -> str:
        with pytest.raises(SystemExit, match=r"^2$"):
            main([str(argument) for argument in arguments])
        assert list(tmp_path.iterdir()) == []
        return capsys.readouterr().err

    assert refused(checkpoint, tmp_path / "model.pt") == (
        f"error: {tmp_path / 'model.pt'}: expected a name that ends in .onnx\n"
    )
    assert "no.pt: no such checkpoint\n" in refused(tmp_path / "no.pt", tmp_path / "model.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    err = refused(checkpoint, tmp_path / "model.onnx")
    assert err.startswith(f"error: {tmp_path / 'model.onnx'}: a package for ONNX is missing (")
    assert err.endswith("; pip install onnx onnxscript\n")
    assert err.count("\n") == 1


def test_the_example_refuses_a_network_of_a_part_of_the_scan(checkpoint, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    network, content = load_network(checkpoint)
    export(network, replace(content["config"], crop="organs"), tmp_path / "model.onnx")
    scan = save_scan(tmp_path / "scan.nii.gz", make_voxels((44, 38, 21)))
    said = run_script("docs/onnx_example.py", tmp_path / "model.onnx", scan, tmp_path / "out.nii")
    assert (said.returncode, said.stderr) == (
        1, f"{tmp_path / 'model.onnx'}: trained with crop: organs; cut the scan to that box first\n"
    )  # fmt: skip
    assert not (tmp_path / "out.nii").exists()
    export(network, content["config"], tmp_path / "model.onnx")
    voxels = make_voxels((44, 38, 21)).astype(np.float32)
    voxels[3, 2, 1] = np.nan
    said = run_script("docs/onnx_example.py", tmp_path / "model.onnx", save_scan(scan, voxels), tmp_path / "out.nii")
    assert (said.returncode, said.stderr) == (1, f"{scan}: holds NaN or infinite voxels; expected HU\n")
    assert not (tmp_path / "out.nii").exists()


def test_a_folder_is_made_for_the_model_and_none_is_replaced(checkpoint, tmp_path, capsys):
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(SystemExit, match=r"^2$"):
        main([str(checkpoint), str(tmp_path / "folder.onnx")])
    assert capsys.readouterr().err == f"error: {tmp_path / 'folder.onnx'}: is a folder, expected a file to write\n"
    assert main([str(checkpoint), str(tmp_path / "new" / "model.onnx")]) == 0
    assert (tmp_path / "new" / "model.onnx").is_file()
