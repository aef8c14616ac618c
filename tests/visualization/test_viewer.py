"""The viewer: what the page holds, and what a real browser shows of it.

The browser is Debian's chromium with its chromium-driver, without a screen and with WebGL in software. Where it is
missing, its tests are skipped; with BROWSER_TESTS=required, as .ci/run sets it, they fail.
"""

import base64
import gzip
import hashlib
import html.parser
import io
import json
import os
import re
import shutil
import tarfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from visualization import viewer
from visualization.page import as_json, make_page
from visualization.vendor import update

ROOT = Path(__file__).resolve().parents[2]
VENDOR = ROOT / "visualization" / "vendor"
SHAPE, SPACING_MM = (40, 36, 20), (2.0, 2.0, 5.0)
ORIGIN_MM = (-30.0, -50.0, 100.0)  # of the voxel (0, 0, 0)
LIVER, SPLEEN, LEFT_KIDNEY = 1, 3, 13
# Boxes by organ. X grows to the patient's right in RAS+ order, so the larger x is on the liver's side.
BOXES = {
    LIVER: (slice(24, 34), slice(8, 28), slice(6, 16)),
    LEFT_KIDNEY: (slice(6, 12), slice(6, 14), slice(4, 10)),
    SPLEEN: (slice(6, 14), slice(18, 28), slice(10, 16)),
}
AFFINE = np.array([[2.0, 0, 0, ORIGIN_MM[0]], [0, 2.0, 0, ORIGIN_MM[1]], [0, 0, 5.0, ORIGIN_MM[2]], [0, 0, 0, 1]])
HOSTILE = "<img src=x onerror=alert(1)>"
COLOUR = {LIVER: (0x9D, 0x43, 0x00), SPLEEN: (0x94, 0x48, 0x82), LEFT_KIDNEY: (0xD2, 0x78, 0x01)}


def label_map(*organs: int) -> np.ndarray:
    labels = np.zeros(SHAPE, np.uint8)
    for organ in organs:
        labels[BOXES[organ]] = organ
    return labels


def scan() -> np.ndarray:
    voxels = np.full(SHAPE, -1000, np.int16)
    voxels[4:36, 4:32] = 30
    voxels[BOXES[LIVER]] = 101
    return voxels


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a scan, a prediction without the spleen and the truth with it."""
    folder = tmp_path_factory.mktemp("viewer")
    volumes = {"scan": scan(), "prediction": label_map(LIVER, LEFT_KIDNEY), "truth": label_map(LIVER, SPLEEN)}
    for name, volume in volumes.items():
        nib.save(nib.Nifti1Image(volume, AFFINE), folder / f"{name}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Path:
    page = folder / "pages" / "viewer.html"
    arguments = [folder / "scan.nii.gz", folder / "prediction.nii.gz", "--reference", folder / "truth.nii.gz"]
    assert viewer.main([*map(str, arguments), "--output", str(page)]) == 0
    return page


class Blocks(html.parser.HTMLParser):
    """The page's elements: data by id, addresses, and the policy."""

    def __init__(self, text: str):
        super().__init__()
        self.data, self.addresses, self.tags, self.policy, self.title = {}, [], [], "", ""
        self.open = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.open = attributes.get("id") if tag == "script" else tag
        self.addresses += [attributes[name] for name in ("src", "href", "action") if name in attributes]
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]

    def handle_endtag(self, tag):
        self.open = None

    def handle_data(self, text):
        if self.open == "title":
            self.title += text
        elif self.open:
            self.data[self.open] = self.data.get(self.open, "") + text


def volume_in(blocks: Blocks, name: str) -> nib.Nifti1Image:
    return nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(blocks.data[name])))


# ---- What the page holds ---------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_lets_nothing_out(page):
    assert os.listdir(page.parent) == [page.name]
    blocks = Blocks(page.read_text(encoding="utf-8"))
    assert blocks.addresses
    assert all(address.startswith("data:image/") for address in blocks.addresses)
    policy = dict(part.strip().split(" ", 1) for part in blocks.policy.split(";"))
    assert policy["default-src"] == "'none'"
    assert not {"connect-src", "frame-src", "worker-src"} & policy.keys()  # so that default-src holds for them
    for kind in ("script-src", "style-src"):
        assert all(source.startswith("'sha256-") for source in policy[kind].split())


def test_the_page_holds_scan_labels_and_volumes(page):
    blocks = Blocks(page.read_text(encoding="utf-8"))
    case = json.loads(blocks.data["case"])
    assert case["sources"] == ["prediction", "reference"]
    found = volume_in(blocks, "scan")
    assert np.allclose(found.affine, AFFINE)
    held = np.asarray(found.dataobj)
    assert {int(held[0, 0, 0]), int(held[5, 5, 5]), int(held[28, 15, 10])} == {-1000, 32, 100}  # multiples of 4
    assert np.array_equal(volume_in(blocks, "labels-0").dataobj, label_map(LIVER, LEFT_KIDNEY))
    assert np.array_equal(volume_in(blocks, "labels-1").dataobj, label_map(LIVER, SPLEEN))
    organs = {organ["id"]: organ for organ in case["organs"]}
    assert organs.keys() == {LIVER, SPLEEN, LEFT_KIDNEY}
    assert organs[LIVER]["sources"][0]["ml"] == pytest.approx(10 * 20 * 10 * 20 / 1000)
    assert organs[SPLEEN]["sources"][0] is None
    assert organs[SPLEEN]["sources"][1]["ml"] == pytest.approx(8 * 10 * 6 * 20 / 1000)
    x, y, z = organs[LEFT_KIDNEY]["sources"][0]["mm"]
    voxel = [round((mm - origin) / step) for mm, origin, step in zip((x, y, z), ORIGIN_MM, SPACING_MM, strict=True)]
    assert label_map(LEFT_KIDNEY)[tuple(voxel)] == LEFT_KIDNEY


def test_surfaces_come_back_from_the_page(page):
    blocks = Blocks(page.read_text(encoding="utf-8"))
    case, packed = json.loads(blocks.data["case"]), gzip.decompress(base64.b64decode(blocks.data["surfaces-data"]))
    parts = {(part["source"], part["organ"]): part for part in case["surfaces"]}
    assert parts.keys() == {(0, LIVER), (0, LEFT_KIDNEY), (1, LIVER), (1, SPLEEN)}
    part = parts[1, SPLEEN]
    steps = np.frombuffer(packed, "<u2", 3 * part["vertices"], part["start"]).reshape(-1, 3)
    faces = np.frombuffer(packed, "<u4", 3 * part["faces"], part["faces_start"]).reshape(-1, 3)
    a, b, c = (np.array(part["low"]) + steps * part["step"])[faces.T]
    assert np.einsum("ij,ij->", a, np.cross(b, c)) / 6000 == pytest.approx(8 * 10 * 6 * 20 / 1000, rel=0.05)
    assert part["low"][0] == pytest.approx(ORIGIN_MM[0] + 2 * 5.5, abs=2)  # the outer face of the spleen's box


def test_large_scans_are_held_smaller_where_they_were(tmp_path, run_main):
    shape = (2048, 512, 4)  # 8 and 2 times IN_PLANE
    voxels, labels = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)
    box = slice(800, 960), slice(100, 120), slice(1, 3)
    voxels[box], labels[box] = 203, LIVER
    # Stored from left to right backwards, so that the page's affine is not the file's.
    affine = np.array([[-0.5, 0, 0, 7], [0, 0.5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1.0]])
    for name, volume in (("scan", voxels), ("labels", labels)):
        nib.save(nib.Nifti1Image(volume, affine), tmp_path / f"{name}.nii")
    paths = tmp_path / "scan.nii", tmp_path / "labels.nii"
    assert viewer.main([*map(str, paths), "--output", str(tmp_path / "small.html")]) == 0
    text = (tmp_path / "small.html").read_text(encoding="utf-8")
    assert "256 x 256 in-plane and in steps of 4 HU" in text
    blocks = Blocks(text)
    small = volume_in(blocks, "labels-0")
    assert small.shape == (256, 256, 4)
    centre = affine @ [879.5, 109.5, 1.5, 1]
    found = small.affine @ [*np.argwhere(np.asarray(small.dataobj)).mean(axis=0), 1]
    assert np.allclose(found, centre, atol=0.01)
    assert json.loads(blocks.data["case"])["organs"][0]["sources"][0]["ml"] == pytest.approx(160 * 20 * 2 * 1.25 / 1000)
    assert viewer.main([*map(str, paths), "--full", "--output", str(tmp_path / "full.html")]) == 0
    full = volume_in(Blocks((tmp_path / "full.html").read_text(encoding="utf-8")), "scan")
    assert full.shape == shape
    assert np.asarray(full.dataobj).max() == 203


def test_names_cannot_bring_along_what_a_browser_would_run(folder, tmp_path):
    path = tmp_path / f"{HOSTILE}.nii.gz"
    shutil.copy(folder / "scan.nii.gz", path)
    settings = (ROOT / "config.yaml").read_text().replace("- liver", f"- '</script>{HOSTILE}'")
    assert HOSTILE in settings
    (tmp_path / "config.yaml").write_text(settings)
    page = tmp_path / "viewer.html"
    arguments = [path, folder / "prediction.nii.gz", "--output", page, "--config", tmp_path / "config.yaml"]
    assert viewer.main(list(map(str, arguments))) == 0
    blocks = Blocks(page.read_text(encoding="utf-8"))
    assert blocks.title == HOSTILE
    assert json.loads(blocks.data["case"])["organs"][0]["name"] == f"</script>{HOSTILE}"
    assert not any("onerror" in attributes for _, attributes in blocks.tags)


def test_a_script_that_ends_itself_is_refused():
    with pytest.raises(ValueError, match="its element's end"):
        make_page("title", "", ["a = '</SCRIPT>'"])
    assert "<" not in as_json({"name": "</script>"})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["scan.nii.gz", "prediction.nii.gz", "--output", "page.png"], 2, "a page's name must end with .html"),
        (["scan.nii.gz", "missing.nii.gz", "--output", "page.html"], 1, "missing.nii.gz"),
        (["scan.nii.gz", "other.nii.gz", "--output", "page.html"], 1, "other.nii.gz"),
    ],
)
def test_refusals_are_one_sentence_and_leave_nothing(folder, monkeypatch, capsys, arguments, code, message):
    nib.save(nib.Nifti1Image(label_map(LIVER)[:-1], AFFINE), folder / "other.nii.gz")
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as end:
        viewer.main(arguments)
    assert end.value.code == code
    assert message in capsys.readouterr().err
    assert not list(folder.glob("page.*"))


def test_a_label_map_without_organs_gives_a_page(folder, tmp_path):
    nib.save(nib.Nifti1Image(label_map(), AFFINE), tmp_path / "empty.nii.gz")
    page = tmp_path / "viewer.html"
    assert viewer.main([str(folder / "scan.nii.gz"), str(tmp_path / "empty.nii.gz"), "--output", str(page)]) == 0
    assert json.loads(Blocks(page.read_text(encoding="utf-8")).data["case"])["organs"] == []


# ---- NiiVue ----------------------------------------------------------------------------------------------------------


def test_niivue_is_what_its_record_says():
    facts = json.loads((VENDOR / "niivue.json").read_text())
    assert hashlib.sha256((VENDOR / facts["file"]).read_bytes()).hexdigest() == facts["sha256"]
    assert facts["licence"] == "BSD-2-Clause"
    assert "Redistribution" in (VENDOR / "niivue.LICENSE").read_text()


def test_an_update_takes_only_the_package_that_the_registry_names(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(update, "FOLDER", tmp_path)
    members = {
        "package/dist/niivue.umd.js": b"let niivue = 1;",
        "package/package.json": b'{"name": "n", "version": "9.9", "license": "L"}',
    }
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            package.addfile(member, io.BytesIO(content))
    digest = hashlib.sha512((tmp_path / "package.tgz").read_bytes()).digest()
    with pytest.raises(SystemExit) as end:
        update.main([str(tmp_path / "package.tgz"), "--integrity", "sha512-other"])
    assert end.value.code == 1
    assert "expected sha512-other" in capsys.readouterr().err
    assert not (tmp_path / "niivue.json").exists()
    integrity = "sha512-" + base64.b64encode(digest).decode()
    assert update.main([str(tmp_path / "package.tgz"), "--integrity", integrity]) == 0
    assert (tmp_path / "niivue.umd.js").read_bytes() == b"let niivue = 1;"
    assert json.loads((tmp_path / "niivue.json").read_text())["version"] == "9.9"


# ---- In a browser ----------------------------------------------------------------------------------------------------

COUNT = """
const [canvas, colours] = arguments;
const nv = window.viewer[canvas];
nv.drawScene();
const gl = nv.gl, width = gl.drawingBufferWidth, height = gl.drawingBufferHeight;
const pixels = new Uint8Array(4 * width * height);
gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
const found = colours.map(() => ({count: 0, x: 0, y: 0}));
for (let place = 0; place < width * height; place++) {
  const [r, g, b] = pixels.subarray(4 * place, 4 * place + 3);
  colours.forEach((colour, number) => {
    if (Math.abs(r - colour[0]) + Math.abs(g - colour[1]) + Math.abs(b - colour[2]) <= 3) {
      found[number].count += 1;
      found[number].x += place % width;
      found[number].y += Math.floor(place / width);
    }
  });
}
return [width, height, found];
"""
# Surfaces are shaded, so that their pixels are those that are no gray: backdrop and letters of the cube are gray, and
# the cube itself, which is not, lies in the lowest fifth.
COUNT_COLOURED = """
const nv = window.viewer.surfaces;
nv.drawScene();
const gl = nv.gl, width = gl.drawingBufferWidth, height = gl.drawingBufferHeight;
const pixels = new Uint8Array(4 * width * height);
gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
let count = 0, across = 0;
for (let place = Math.floor(height / 5) * width; place < width * height; place++) {
  const [r, g, b] = pixels.subarray(4 * place, 4 * place + 3);
  if (Math.max(r, g, b) - Math.min(r, g, b) > 12) {
    count += 1;
    across += place % width;
  }
}
return [count, across / Math.max(count, 1) / width];
"""
NO_WEBGL = "HTMLCanvasElement.prototype.getContext = () => null;"


@pytest.fixture(scope="module")
def chromium():
    """Return a browser without a screen; its log tells of errors and requests."""
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    if missing:
        reason = f"{' and '.join(missing)} not found; Debian: apt-get install chromium chromium-driver"
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{flag}")
    for flag in ("use-angle=swiftshader", "enable-unsafe-swiftshader", "ignore-gpu-blocklist"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    yield browser
    browser.quit()


def load(browser, page: Path) -> None:
    browser.get(page.as_uri())
    until = time.monotonic() + 120
    while browser.execute_script("return document.body.dataset.ready") != "yes":
        assert time.monotonic() < until, browser.get_log("browser")
        time.sleep(0.1)


@pytest.fixture(scope="module")
def loaded(chromium, page):
    """Return the browser with the page, which takes seconds to draw for the first time."""
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1400, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    load(chromium, page)
    chromium.execute_script("document.getElementById('opacity').value = 1; window.viewer.update()")
    return chromium


@pytest.fixture
def opened(loaded):
    """Return the browser with the page, all organs shown."""
    click(loaded, "show-all")
    return loaded


def press(browser, key: str, on: str = "body") -> None:
    from selenium.webdriver.common.by import By

    browser.execute_script(f"document.querySelector('{on}').focus()")
    browser.find_element(By.CSS_SELECTOR, on).send_keys(key)


def click(browser, element: str) -> None:
    browser.execute_script(f"document.getElementById('{element}').click()")


def in_slices(browser) -> dict[int, int]:
    """Count the pixels of the slices that have exactly an organ's colour, by organ."""
    found = browser.execute_script(COUNT, "slices", [COLOUR[organ] for organ in COLOUR])[2]
    return {organ: seen["count"] for organ, seen in zip(COLOUR, found, strict=True)}


def test_it_opens_without_an_error_and_asks_nobody(opened):
    errors = [entry["message"] for entry in opened.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert not errors
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked
    assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]
    assert len({url for url in asked if url.startswith("file:")}) == 1
    blocked = opened.execute_async_script(
        "fetch('https://example.org/').then(() => arguments[0]('sent'), () => arguments[0]('blocked'))"
    )
    assert blocked == "blocked"
    assert "Content Security Policy" in " ".join(entry["message"] for entry in opened.get_log("browser"))


def test_organs_are_shown_and_hidden_in_the_slices(opened):
    click(opened, "hide-all")
    assert in_slices(opened) == {LIVER: 0, SPLEEN: 0, LEFT_KIDNEY: 0}
    for organ in (LIVER, LEFT_KIDNEY):
        click(opened, "hide-all")
        click(opened, f"go-{organ}")
        click(opened, f"show-{organ}")
        counts = in_slices(opened)
        assert counts.pop(organ) > 30
        assert not any(counts.values())
    click(opened, "show-all")
    assert in_slices(opened)[LIVER] > 30


def test_organs_are_shown_and_hidden_in_3_d(opened):
    click(opened, "hide-all")
    assert opened.execute_script(COUNT_COLOURED)[0] == 0
    sides = {}
    for organ in (LIVER, LEFT_KIDNEY):
        click(opened, "hide-all")
        click(opened, f"show-{organ}")
        count, sides[organ] = opened.execute_script(COUNT_COLOURED)
        assert count > 30
    assert sides[LIVER] < 0.5 < sides[LEFT_KIDNEY]  # from the front, the patient's right is at the left


def test_the_patients_right_is_at_the_left_of_the_slices(opened):
    click(opened, f"go-{LIVER}")
    # The coronal and the axial slice stand in the left half of the canvas; the sagittal one is cut by the liver alone.
    opened.execute_script("window.viewer.slices.setSliceType(0)")  # axial alone
    width, _, (liver,) = opened.execute_script(COUNT, "slices", [COLOUR[LIVER]])
    assert liver["count"] > 30
    assert liver["x"] / liver["count"] < width / 2
    opened.execute_script("window.viewer.slices.setSliceType(3)")


def test_the_truth_can_be_switched_to(opened):
    assert in_slices(opened)[SPLEEN] == 0
    press(opened, "t")
    click(opened, f"go-{SPLEEN}")
    counts = in_slices(opened)
    assert counts[SPLEEN] > 30
    assert counts[LEFT_KIDNEY] == 0
    assert opened.execute_script(f"return document.getElementById('go-{LEFT_KIDNEY}').disabled")
    assert opened.execute_script(f"return document.getElementById('ml-{SPLEEN}').textContent") == "9.6"
    only_truth = "return window.viewer.surfaces.meshes.filter((m) => m.visible).map((m) => m.organ).sort()"
    assert opened.execute_script(only_truth) == [LIVER, SPLEEN]
    press(opened, "t")
    assert in_slices(opened)[SPLEEN] == 0


def test_place_hu_and_organ_are_read_out(opened):
    click(opened, f"go-{LIVER}")
    text = opened.execute_script("return document.getElementById('readout').textContent")
    assert text.endswith("100 HU  ·  liver")
    right, front, head = (int(n) for n in re.findall(r"(\d+) mm", text)[:3])
    # The middle of the liver's box in world mm, to half a voxel: x 28.5, y 17.5, the first of its slices z 6.
    assert abs(right - (ORIGIN_MM[0] + 2 * 28.5)) <= 1.5
    assert abs(-front - (ORIGIN_MM[1] + 2 * 17.5)) <= 1.5
    assert head == ORIGIN_MM[2] + 5 * 6
    assert re.match(r"\d+ mm R, \d+ mm P, \d+ mm S", text)


def test_keys_move_the_cross_and_choose_windows(opened):
    from selenium.webdriver.common.keys import Keys

    click(opened, f"go-{LIVER}")
    place = "return window.viewer.slices.frac2mm(window.viewer.slices.scene.crosshairPos).slice(0, 3)"
    before = opened.execute_script(place)
    for key in (Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.PAGE_UP):
        press(opened, key, "#slices")
    after = opened.execute_script(place)
    assert np.allclose(np.subtract(after, before), SPACING_MM, atol=0.01)
    press(opened, "3")
    window = "const scan = window.viewer.slices.volumes[0]; return [scan.cal_min, scan.cal_max]"
    assert opened.execute_script(window) == [-450, 1050]
    press(opened, "o")
    outlined = in_slices(opened)[LIVER]
    press(opened, "o")
    assert 0 < outlined < in_slices(opened)[LIVER] / 2


def test_it_fits_a_phone(chromium, page):
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    load(chromium, page)
    assert chromium.execute_script("return document.documentElement.scrollWidth") <= 390
    assert chromium.execute_script("return document.getElementById('surfaces').getBoundingClientRect().width") > 300


def test_without_webgl_it_shows_pictures_and_says_so(chromium, page):
    script = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NO_WEBGL})
    try:
        chromium.get(page.as_uri())
        text = chromium.execute_script("return document.getElementById('why').innerText")
        assert "no WebGL 2" in text
        sizes = "return [...document.querySelectorAll('#stills img')].map((i) => i.naturalWidth * i.checkVisibility())"
        assert all(width > 300 for width in chromium.execute_script(sizes))
        assert not chromium.execute_script("return document.getElementById('viewer').checkVisibility()")
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)
