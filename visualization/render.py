"""Pictures of organ surfaces by ray casting (Intel Embree): no display, no GPU, no system library.

    Scene({organ: mesh, ...}) -> render(scene, view, size) -> Frame

The camera looks at the patient from the front at 0 degrees and goes around the body axis, without perspective, so that
mm are mm everywhere. The organs do not move against each other, so how much of the surroundings reaches each vertex
(ambient occlusion) is worked out once for all frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from embreex.mesh_construction import TriangleMesh
from embreex.rtcore_scene import EmbreeScene

from visualization.meshes import Mesh
from visualization.style import colour_of

RAYS_AROUND = 64  # from each vertex to the surroundings
REACH_MM = 50.0  # what is farther away throws no shade
LIFT_MM = 0.3  # by which those rays start above the surface that they leave
FILLED = 0.92  # share of the picture that the organs may fill
AMBIENT, KEY, FILL, SHINE = 0.5, 0.58, 0.2, 0.09  # strengths of the lights
GLOSS = 24  # exponent of the highlight
# Where the lights stand, in the camera's axes: right, up, towards the camera.
KEY_FROM, FILL_FROM = (-0.5, 0.65, 0.6), (0.8, -0.1, 0.4)
AWAY_MM = 3000.0  # of the camera's plane from the scene's centre
VEIL_LIGHT, RIM_FALL = 0.55, 3  # gray of what is seen through, and how fast it clears away from its rim
GAMMA = 2.2  # of screens; light adds up before it
BACKDROP = (0.105, 0.03)  # gray at the top and at the bottom, as a screen shows it
# Places of an edge pixel's four rays, in pixels off its centre (a rotated square).
SUBPIXELS = ((-0.125, -0.375), (0.375, -0.125), (-0.375, 0.125), (0.125, 0.375))


@dataclass(frozen=True)
class Frame:
    """A picture, rows from the top.

    Attributes:
        colour: (H, W, 3) uint8.
        organ: (H, W) uint8, the id seen at each pixel's centre; 0 where there is none.
        depth_mm: (H, W) float32 from the camera's plane; inf where there is no organ.
    """

    colour: np.ndarray
    organ: np.ndarray
    depth_mm: np.ndarray


@dataclass(frozen=True)
class View:
    """A camera: `right`, `up`, `back` (from the scene to the camera) are unit vectors in the patient's RAS+ axes."""

    right: np.ndarray
    up: np.ndarray
    back: np.ndarray


def view_at(degrees: float) -> View:
    """Return the camera after so many degrees: 0 from the front, 90 from the patient's left, 180 from behind."""
    angle = np.radians(degrees)
    back = np.array([-np.sin(angle), np.cos(angle), 0.0])
    up = np.array([0.0, 0.0, 1.0])
    return View(np.cross(up, back), up, back)


class Scene:
    """Organs ready to be looked at.

    Args:
        meshes: by organ id; at least one.
    """

    def __init__(self, meshes: dict[int, Mesh]):
        self.vertices = np.concatenate([mesh.vertices for mesh in meshes.values()])
        self.normals = np.concatenate([mesh.normals for mesh in meshes.values()])
        starts = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes.values())])
        self.faces = np.concatenate([mesh.faces + start for mesh, start in zip(meshes.values(), starts, strict=False)])
        self.organ = np.repeat(np.array([*meshes], np.uint8), [len(mesh.faces) for mesh in meshes.values()])
        self.palette = np.zeros((256, 3))
        for organ in meshes:
            self.palette[organ] = np.power(colour_of(organ), GAMMA)
        self.centre_on((self.vertices.min(axis=0) + self.vertices.max(axis=0)) / 2)
        self.embree = EmbreeScene()
        self.kept = TriangleMesh(self.embree, self.vertices.astype(np.float32), self.faces.astype(np.int32))
        self.openness = self.ambient()

    def centre_on(self, centre: np.ndarray) -> None:
        """Have a place, (3,) in mm, in the middle of pictures; it starts as that of the organs' box."""
        self.centre = centre
        around = self.vertices - centre
        # Half of what must fit: the radius about the body axis, as the camera goes around it, and the height.
        self.half_mm = np.hypot(around[:, 0], around[:, 1]).max(), np.abs(around[:, 2]).max()

    def ambient(self) -> np.ndarray:
        """(N,) from 0 to 1: how much light from all around reaches each vertex (ambient occlusion)."""
        light, most = np.zeros(len(self.vertices)), np.zeros(len(self.vertices))
        for direction in sphere(RAYS_AROUND):
            slant = self.normals @ direction
            facing = slant > 0
            start = self.vertices[facing] + LIFT_MM * self.normals[facing]
            free = np.minimum(self.cast(start, direction)["tfar"] / REACH_MM, 1)
            light[facing] += slant[facing] * free
            most[facing] += slant[facing]
        return light / np.maximum(most, np.finfo(float).tiny)

    def cast(self, start: np.ndarray, direction: np.ndarray) -> dict[str, np.ndarray]:
        """Cast rays from (N, 3) points in one direction; return Embree's first hits."""
        directions = np.broadcast_to(np.asarray(direction, np.float32), start.shape)
        return self.embree.run(np.ascontiguousarray(start, np.float32), np.ascontiguousarray(directions), output=1)

    def surface_at(self, hit: dict[str, np.ndarray], met: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return normals (N, 3) and openness (N,) where the hits in a mask are, interpolated between the vertices."""
        u, v = (hit[name][met, None].astype(float) for name in "uv")
        a, b, c = self.faces[hit["primID"][met]].T
        both = np.column_stack([self.normals, self.openness])
        mean = (1 - u - v) * both[a] + u * both[b] + v * both[c]
        return mean[:, :3], mean[:, 3]


def sphere(count: int) -> np.ndarray:
    """(count, 3) unit vectors spread evenly over all directions (Fibonacci's spiral)."""
    number = np.arange(count) + 0.5
    height, turn = 1 - 2 * number / count, np.pi * (1 + 5**0.5) * number
    width = np.sqrt(1 - height**2)
    return np.stack([width * np.cos(turn), width * np.sin(turn), height], axis=1)


@dataclass(frozen=True)
class Veil:
    """A surface that is seen through, brighter where it is seen edge on, so that its outline shows.

    Attributes:
        scene: of one mesh.
        flat: opacity where it faces the camera, 0 to 1.
        rim: opacity where it is seen edge on.
    """

    scene: Scene
    flat: float
    rim: float

    def over(self, light: np.ndarray, start: np.ndarray, view: View, depth_mm: np.ndarray) -> np.ndarray:
        """(N, 3) light with the veil over it, but where something nearer than the veil, at (N,) depths, sent it."""
        hit = self.scene.cast(start, -view.back)
        met = (hit["primID"] >= 0) & (hit["tfar"] < depth_mm)
        normal, openness = self.scene.surface_at(hit, met)
        facing = np.abs(normal @ view.back) / np.maximum(np.linalg.norm(normal, axis=1), np.finfo(float).tiny)
        opacity = (self.flat + (self.rim - self.flat) * (1 - facing) ** RIM_FALL)[:, None]
        own = shaded(np.full(normal.shape, VEIL_LIGHT), normal, openness, view)
        veiled = light.copy()
        veiled[met] = light[met] * (1 - opacity) + own * opacity
        return veiled


def render(
    scene: Scene, view: View, size: tuple[int, int], mm_a_pixel: float | None = None, veils: Sequence[Veil] = ()
) -> Frame:
    """Draw a scene.

    Args:
        scene: whose centre comes to the picture's.
        view: the camera.
        size: of the picture, width and height in pixels.
        mm_a_pixel: the scale; without it the organs fill the picture, from every side alike.
        veils: what the organs are seen through, the innermost first; ids and depths are those of the organs.
    """
    width, height = size
    mm = mm_a_pixel or fitting_scale(scene, size)
    rows, columns = np.mgrid[:height, :width].reshape(2, -1)
    seen = np.flatnonzero(
        (np.abs(columns - (width - 1) / 2) * mm <= scene.half_mm[0] + mm)
        & (np.abs(rows - (height - 1) / 2) * mm <= scene.half_mm[1] + mm)
    )
    light = np.power(backdrop(size), GAMMA).reshape(-1, 3)
    organ, depth_mm = np.zeros(width * height, np.uint8), np.full(width * height, np.inf, np.float32)
    starts = partial(ray_starts, scene, view, size, mm)
    light[seen], organ[seen], depth_mm[seen] = look(scene, view, starts(rows[seen], columns[seen]), light[seen])
    edges = np.flatnonzero(is_edge(organ.reshape(height, width)).ravel())
    behind = np.power(backdrop(size), GAMMA).reshape(-1, 3)[edges]
    around = [look(scene, view, starts(rows[edges] + y, columns[edges] + x), behind)[0] for x, y in SUBPIXELS]
    light[edges] = np.mean(around, axis=0)
    if veils:
        start = starts(rows, columns)
        for veil in veils:
            light = veil.over(light, start, view, depth_mm)
    colour = np.round(255 * np.clip(light, 0, 1) ** (1 / GAMMA)).astype(np.uint8)
    return Frame(colour.reshape(height, width, 3), organ.reshape(height, width), depth_mm.reshape(height, width))


def fitting_scale(scene: Scene, size: tuple[int, int]) -> float:
    """Return the scale, in mm per pixel, at which the organs fill a picture of that width and height."""
    return max(2 * half / (pixels * FILLED) for half, pixels in zip(scene.half_mm, size, strict=True))


def look(scene: Scene, view: View, start: np.ndarray, behind: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what rays from (N, 3) points on the camera's plane see: light (N, 3), organ ids and depths in mm.

    `behind` (N, 3) is the light where they meet nothing.
    """
    hit = scene.cast(start, -view.back)
    met = hit["primID"] >= 0
    light, organ, depth_mm = behind.copy(), np.zeros(len(start), np.uint8), np.full(len(start), np.inf, np.float32)
    organ[met], depth_mm[met] = scene.organ[hit["primID"][met]], hit["tfar"][met]
    light[met] = shaded(scene.palette[organ[met]], *scene.surface_at(hit, met), view)
    return light, organ, depth_mm


def ray_starts(
    scene: Scene, view: View, size: tuple[int, int], mm: float, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """(N, 3): where on the camera's plane, in front of everything, rays through places of the picture start."""
    x, y = (columns - (size[0] - 1) / 2) * mm, ((size[1] - 1) / 2 - rows) * mm
    return scene.centre + x[:, None] * view.right + y[:, None] * view.up + AWAY_MM * view.back


def shaded(colour: np.ndarray, normals: np.ndarray, openness: np.ndarray, view: View) -> np.ndarray:
    """Return the light from surfaces of (N, 3) colours to the camera: ambient, two lamps, and a highlight."""
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), np.finfo(float).tiny)
    axes = np.stack([view.right, view.up, view.back])
    key, fill = (np.array(place) / np.linalg.norm(place) @ axes for place in (KEY_FROM, FILL_FROM))
    halfway = (key + view.back) / np.linalg.norm(key + view.back)
    strength = AMBIENT * openness + (KEY * np.clip(normals @ key, 0, 1) + FILL * np.clip(normals @ fill, 0, 1)) * (
        0.4 + 0.6 * openness
    )
    highlight = SHINE * np.clip(normals @ halfway, 0, 1) ** GLOSS * openness
    return colour * strength[:, None] * 1.25 + highlight[:, None]


def is_edge(organ: np.ndarray) -> np.ndarray:
    """(H, W) pixels one of whose neighbours above, below, left or right shows another organ."""
    edge = np.zeros(organ.shape, bool)
    down, across = organ[1:] != organ[:-1], organ[:, 1:] != organ[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return edge


def backdrop(size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) in 0..1: an empty picture, a little lighter at the top."""
    width, height = size
    return np.broadcast_to(np.linspace(*BACKDROP, height)[:, None, None], (height, width, 3))
