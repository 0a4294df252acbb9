"""Abdominal CT phantoms: small volumes with liver, spleen, pancreas and kidneys, drawn from a seed.

Every structure is a *depth field*: the approximate distance in mm to the structure's surface, positive inside.
Depth fields join by maximum, intersect by minimum and turn into partial-volume weights by division by the voxel size.
They are evaluated in anatomical coordinates (mm; x to the patient's right, y anterior, z superior; the origin in front
of the upper lumbar spine) that a random similarity and a smooth deformation bend differently in every case.

Attenuation values are the usual ones of a portal-venous scan: parenchyma 90 to 200 HU, muscle 50, fat -100, lung -850.
"""

import gzip
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.ndimage import label as label_pieces
from scipy.sparse import csr_array
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from scripts.errors import ConfigError, OutputError

Field = NDArray[np.float32]
Triple = tuple[float, float, float]

LABEL_MAP: dict[int, str] = {1: "liver", 2: "spleen", 3: "pancreas", 4: "left kidney", 5: "right kidney"}
LIVER, SPLEEN, PANCREAS, LEFT_KIDNEY, RIGHT_KIDNEY = LABEL_MAP

FIELD_OF_VIEW_MM = (335.0, 380.0)
COVERAGE_MM = (148.0, 168.0)
ANATOMY_MM = (-70.0, 62.0)  # lowest kidney pole and highest point of the liver, in anatomical z
LOWEST_HU, HIGHEST_HU = -1024, 3071
LARGEST_GROWTH_MM = np.float32(9)
FAR_OUTSIDE = np.float32(-1e3)
# Which way the file's axes run; a CT converted from DICOM usually comes as LPS.
ORIENTATIONS = ("LPS", "LPS", "LAS", "RAS", "LPI")


@dataclass(frozen=True)
class Phantom:
    """One case.

    Attributes:
        hu: attenuation `(X, Y, Z)` int16 in HU, between -1024 and 3071, in file axes.
        labels: `(X, Y, Z)` uint8, 0 for background, otherwise a key of `LABEL_MAP`.
        affine: `(4, 4)` float64, voxel index to mm, RAS+.
    """

    hu: NDArray[np.int16]
    labels: NDArray[np.uint8]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class _Grid:
    """The voxel centres in mm, seen from the middle of the volume, along right, anterior and superior."""

    axes: tuple[Field, Field, Field]
    spacing: Triple

    @property
    def shape(self) -> tuple[int, int, int]:
        return (len(self.axes[0]), len(self.axes[1]), len(self.axes[2]))

    @property
    def voxel_ml(self) -> float:
        return float(np.prod(self.spacing)) / 1000.0


@dataclass
class _Scene:
    """What is being drawn: the bent coordinates, the picture and the space that organs have taken.

    All fields are `(X, Y, Z)`; `x`, `y` and `z` are anatomical coordinates in mm and `taken` is the depth in everything
    that a later organ must leave room for.
    """

    rng: np.random.Generator
    grid: _Grid
    x: Field
    y: Field
    z: Field
    hu: Field
    labels: NDArray[np.uint8]
    taken: Field

    def noise(self, length: float) -> Field:
        return _smooth_noise(self.rng, self.grid.axes, length)

    def vary(self, centre: Triple, millimetres: float) -> Triple:
        x, y, z = np.asarray(centre) + self.rng.uniform(-millimetres, millimetres, 3)
        return (float(x), float(y), float(z))

    def weight(self, depth: Field) -> Field:
        """The part of each voxel that lies inside: a ramp one in-plane voxel wide across the surface."""
        return np.clip(depth / np.float32(self.grid.spacing[0]) + np.float32(0.5), 0, 1)

    def paint(self, depth: Field, value: float | Field) -> None:
        self.hu += self.weight(depth) * (value - self.hu)

    def reserve(self, depth: Field) -> None:
        np.maximum(self.taken, depth, out=self.taken)

    def free(self, gap: float) -> Field:
        """Depth in the space that nobody has taken, kept `gap` mm away from all that is there."""
        return -self.taken - np.float32(gap)

    def ellipsoid(self, centre: Triple, radii: Triple, degrees: Triple = (0, 0, 0)) -> Field:
        """Depth in an ellipsoid turned by `degrees` about x, y and z."""
        turn = Rotation.from_euler("xyz", degrees, degrees=True).as_matrix().astype(np.float32)
        offset = [axis - np.float32(middle) for axis, middle in zip((self.x, self.y, self.z), centre, strict=True)]
        turned = [turn[0, k] * offset[0] + turn[1, k] * offset[1] + turn[2, k] * offset[2] for k in range(3)]
        return _ellipsoid_depth(turned, radii)

    def column(self, centre: tuple[float, float], radii: tuple[float, float]) -> Field:
        """Depth in an elliptic cylinder that runs along z."""
        return _ellipsoid_depth([self.x - np.float32(centre[0]), self.y - np.float32(centre[1])], radii)

    def tube(self, points: Sequence[Triple], radii: Sequence[float]) -> Field:
        """Depth in a chain of round cones through `points` (mm) with the given radii (mm)."""
        depth = np.full(self.grid.shape, FAR_OUTSIDE)
        path, thickness = np.asarray(points, np.float32), np.asarray(radii, np.float32)
        reach = thickness.max() + np.float32(20)
        low, high = path.min(axis=0) - reach, path.max(axis=0) + reach
        near = (self.x > low[0]) & (self.x < high[0]) & (self.y > low[1]) & (self.y < high[1])
        near &= (self.z > low[2]) & (self.z < high[2])
        depth[near] = _chain_depth((self.x[near], self.y[near], self.z[near]), path, thickness)
        return depth


def _smooth_noise(rng: np.random.Generator, axes: Sequence[Field], length: float) -> Field:
    """Gaussian noise of unit variance with a correlation length in mm: deviates on a lattice, blended smoothly."""
    bases = [_blending(axis, length) for axis in axes]
    noise = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    for basis in bases:
        # The first axis is blended and becomes the last, so that three turns restore the order.
        noise = (basis @ noise.reshape(noise.shape[0], -1)).T.reshape(*noise.shape[1:], -1)
    return np.ascontiguousarray(noise)


def _blending(axis: Field, length: float) -> csr_array:
    """Weights `(voxels, nodes)` of lattice nodes `length` mm apart; each row has a sum of squares of one.

    Sparse, because only near nodes count, and because the product then runs in one thread with one order of summation.
    """
    nodes = np.arange(axis.min() - 2 * length, axis.max() + 2 * length, length)
    weights = np.exp(-0.5 * ((axis[:, None] - nodes) / (0.75 * length)) ** 2)
    weights[weights < 0.01] = 0
    return csr_array((weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))).astype(np.float32))


def _ellipsoid_depth(offset: Sequence[Field], radii: Sequence[float]) -> Field:
    """First-order distance to an ellipsoid's surface: the level-set function divided by its gradient."""
    scaled = [part / np.float32(radius) for part, radius in zip(offset, radii, strict=True)]
    level = np.sqrt(sum((part * part for part in scaled), start=np.float32(1e-6)))
    slopes = ((part / np.float32(radius)) ** 2 for part, radius in zip(scaled, radii, strict=True))
    return level * (1 - level) / np.sqrt(sum(slopes, start=np.float32(1e-9)))


def _chain_depth(points: tuple[Field, Field, Field], path: Field, radii: Field) -> Field:
    """Largest depth over the segments of `path` `(N, 3)`; the radius runs linearly along each segment."""
    depth = np.full(points[0].shape, FAR_OUTSIDE)
    for start, end, first, last in zip(path, path[1:], radii, radii[1:], strict=False):
        way = end - start
        offset = [part - origin for part, origin in zip(points, start, strict=True)]
        along = (offset[0] * way[0] + offset[1] * way[1] + offset[2] * way[2]) / (way @ way)
        along = np.clip(along, 0, 1)
        squares = ((part - along * step) ** 2 for part, step in zip(offset, way, strict=True))
        np.maximum(depth, first + along * (last - first) - np.sqrt(sum(squares, start=np.float32(0))), out=depth)
    return depth


def _soft_minimum(first: Field, second: Field, width: float) -> Field:
    """Intersection of two depth fields with the edge rounded over `width` mm."""
    share = np.clip(0.5 + (second - first) / np.float32(2 * width), 0, 1)
    return second + share * (first - second) - np.float32(width) * share * (1 - share)


def _fit_volume(scene: _Scene, depth: Field, room: Field, millilitres: float) -> Field:
    """Grow or shrink `depth` evenly until its part inside `room` has the wanted volume, or nearly so."""
    candidates = depth[room > 0]
    wanted = min(max(round(millilitres / scene.grid.voxel_ml), 1), candidates.size - 1)
    level = np.partition(candidates, candidates.size - wanted)[candidates.size - wanted]
    # An organ that finds little room stays smaller rather than flow around its neighbours.
    return np.minimum(depth - max(level, -LARGEST_GROWTH_MM), room)


def _largest_piece(depth: Field) -> Field:
    """Drop what neighbours have cut off: an organ is one piece."""
    pieces, count = label_pieces(depth > 0)
    if count < 2:
        return depth
    largest = 1 + int(np.argmax(np.bincount(pieces.ravel())[1:]))
    return np.where((pieces == 0) | (pieces == largest), depth, FAR_OUTSIDE)


def _draw_organ(scene: _Scene, label: int, depth: Field, value: float | Field) -> None:
    """Paint an organ, label it and keep its place."""
    depth = _largest_piece(depth)
    scene.paint(depth, value)
    scene.labels[depth > 0] = label
    scene.reserve(depth)


def _parenchyma(scene: _Scene, value: float, spread: float = 6.0) -> Field:
    """Attenuation of an organ: its mean differs from case to case, its texture is smooth and weak."""
    return np.float32(value + scene.rng.uniform(-spread, spread)) + np.float32(4) * scene.noise(14.0)


def _make_grid(rng: np.random.Generator, size: int, slices: int) -> _Grid:
    plane, through = rng.uniform(*FIELD_OF_VIEW_MM) / size, rng.uniform(*COVERAGE_MM) / slices
    spacing = (round(plane, 3), round(plane, 3), round(through, 3))
    counts = (size, size, slices)
    right, front, up = (
        ((np.arange(count) - (count - 1) / 2) * step).astype(np.float32)
        for count, step in zip(counts, spacing, strict=True)
    )
    return _Grid((right, front, up), spacing)


def _anatomical_coordinates(rng: np.random.Generator, grid: _Grid) -> list[Field]:
    """Scanner millimetres to anatomical millimetres: shift, turn about z, scale and smooth deformation."""
    scale, angle = rng.uniform(0.95, 1.03), np.deg2rad(rng.uniform(-5, 5))
    room = max(grid.spacing[2] * grid.shape[2] / 2 - scale * (ANATOMY_MM[1] - ANATOMY_MM[0]) / 2, 0.0)
    lift = rng.uniform(-room, room) - scale * sum(ANATOMY_MM) / 2
    right = grid.axes[0][:, None, None] - np.float32(rng.uniform(-6, 6))
    front = grid.axes[1][None, :, None] - np.float32(rng.uniform(-2, 10))
    up = grid.axes[2][None, None, :] - np.float32(lift)
    cosine, sine = np.float32(np.cos(angle) / scale), np.float32(np.sin(angle) / scale)
    plain = (cosine * right + sine * front, cosine * front - sine * right, up / np.float32(scale))
    return [part + np.float32(2.5) * _smooth_noise(rng, grid.axes, 55.0) for part in plain]


def _make_scene(rng: np.random.Generator, size: int, slices: int) -> _Scene:
    grid = _make_grid(rng, size, slices)
    x, y, z = _anatomical_coordinates(rng, grid)
    air = np.full(grid.shape, -1000, np.float32)
    return _Scene(rng, grid, x, y, z, air, np.zeros(grid.shape, np.uint8), np.full(grid.shape, FAR_OUTSIDE))


def _diaphragm(scene: _Scene) -> Field:
    """Depth below the two domes of the diaphragm, the right one higher."""
    right = 61 - 0.0043 * (scene.x - 52) ** 2 - 0.0046 * (scene.y - 8) ** 2
    left = 53 - 0.0047 * (scene.x + 58) ** 2 - 0.0048 * (scene.y - 5) ** 2
    return (np.maximum(right, left) - scene.z) * np.float32(0.85)


def _draw_table(scene: _Scene) -> None:
    """The curved table top, fixed to the scanner and not to the patient."""
    right, front = scene.grid.axes[0][:, None, None], scene.grid.axes[1][None, :, None]
    height = np.float32(-130) + np.float32(0.0007) * right**2
    shell = np.float32(3.5) - np.abs(front - height) + 0 * scene.z
    scene.paint(shell, -60.0)


def _draw_trunk(scene: _Scene) -> tuple[Field, Field]:
    """Skin, fat, muscle wall and ribs; returns the depth in the cavity and below the diaphragm."""
    width, depth = scene.rng.uniform(150, 157), scene.rng.uniform(110, 117)
    body = scene.column((0, -2), (width, depth))
    wall = scene.column((0, 0), (width - scene.rng.uniform(8, 14), depth - scene.rng.uniform(8, 13)))
    cavity = np.minimum(wall - np.float32(11), body - np.float32(19))
    scene.paint(body, 15.0)
    scene.paint(body - np.float32(2.5), -102 + 5 * scene.noise(25.0))
    scene.paint(wall, 52 + 10 * scene.noise(12.0))
    scene.paint(cavity, -98 + 8 * scene.noise(12.0))
    below = _diaphragm(scene)
    _draw_ribs(scene, wall)
    return cavity, below


def _draw_ribs(scene: _Scene, wall: Field) -> None:
    """Oblique bone bars inside the muscle wall, none below the costal margin."""
    phase = (scene.z - 0.45 * scene.y + scene.rng.uniform(0, 27)) * np.float32(2 * np.pi / 27)
    bar = (np.cos(phase) - np.float32(0.35)) * np.float32(6)
    shell = np.float32(4.5) - np.abs(wall - np.float32(6))
    costal = np.minimum(scene.z + 45 - 0.5 * scene.y, np.abs(scene.x) - 35)
    rib = np.minimum(np.minimum(bar, shell), costal)
    scene.paint(rib, 420.0)
    scene.paint(rib - np.float32(2.5), 230.0)


def _draw_spine(scene: _Scene) -> None:
    """Vertebral bodies with discs, canal and processes, and the muscles beside them."""
    for side in (-1, 1):
        erector = scene.column((side * 38, -77), (30, 19))
        scene.paint(erector, 54 + 10 * scene.noise(10.0))
        psoas = scene.column((side * 36, -52), (15, 16))
        scene.paint(np.minimum(psoas, -scene.z - 5), 56.0)
        scene.reserve(np.maximum(np.minimum(psoas, -scene.z - 5), erector))
    body = scene.column((0, -56), (23, 17))
    disc = np.abs((scene.z + scene.rng.uniform(0, 32)) % 32 - 16) < 4
    spine = np.maximum(scene.column((0, -93), (5, 16)), scene.column((0, -77), (20, 11)))
    scene.paint(spine, 380.0)
    scene.paint(body, np.where(disc, np.float32(95), np.float32(420)))
    scene.paint(body - np.float32(3.5), np.where(disc, np.float32(85), 210 + 25 * scene.noise(7.0)))
    scene.paint(scene.column((0, -78), (9, 8)), 30.0)
    scene.reserve(np.maximum(body, spine))


def _draw_chest(scene: _Scene, cavity: Field, below: Field) -> None:
    """Lung and heart above the diaphragm."""
    above = np.minimum(np.minimum(-below, cavity + np.float32(4)), scene.free(0.0))
    mediastinum = np.maximum(scene.column((0, -40), (34, 30)), scene.column((-8, 58), (34, 30)))
    scene.paint(above, -30 + 25 * scene.noise(20.0))
    lung = np.minimum(np.minimum(above - np.float32(1.5), -mediastinum), scene.free(2.0))
    scene.paint(lung, -850 + 25 * scene.noise(12.0))
    heart = scene.ellipsoid(scene.vary((-20, 28, 70), 4), (52, 42, 38), (0, 25, 30))
    scene.paint(np.minimum(heart, above - np.float32(2)), 135 + 10 * scene.noise(15.0))
    # Nothing abdominal grows through the diaphragm.
    scene.reserve(-below)


def _draw_vessels(scene: _Scene) -> None:
    """Aorta, inferior vena cava and the portal vein that rises behind the neck of the pancreas."""
    aorta = scene.column((-9, -26), (10.5, 10.5))
    cava = scene.column((23, -27), (12, 9.5))
    portal = scene.tube([(8, -4, -70), (9, -3, -8), (22, -1, 10), (48, 4, 24)], (5.5, 6.5, 7, 6))
    for vessel, value in ((aorta, 165.0), (cava, 140.0), (portal, 175.0)):
        scene.paint(vessel, value + scene.rng.uniform(-8, 8))
        scene.reserve(vessel)


def _kidney_depth(scene: _Scene, side: int) -> Field:
    """A bean: an ellipsoid with its upper pole towards the spine and a hollow that faces it."""
    centre = scene.vary((side * 64, -41, -12), 4.5)
    shape = scene.ellipsoid(centre, (27, 24, 52), (scene.rng.uniform(-12, -2), -side * scene.rng.uniform(4, 14), 0))
    hilum = scene.ellipsoid((centre[0] - side * 24, centre[1] + 9, centre[2]), (14, 9, 15))
    return _soft_minimum(shape, -hilum, 4.0) + np.float32(1.3) * scene.noise(22.0)


def _draw_kidney(scene: _Scene, label: int, side: int, cavity: Field) -> None:
    """Bright cortex around the darker medulla; `side` is +1 for the patient's right."""
    room = np.minimum(scene.free(2.5), cavity)
    depth = _fit_volume(scene, _kidney_depth(scene, side), room, scene.rng.uniform(138, 192))
    medulla = np.clip((depth - np.float32(7) + 3 * scene.noise(10.0)) / 4, 0, 1)
    contrast = (np.float32(42) * medulla).astype(np.float32)
    _draw_organ(scene, label, depth, _parenchyma(scene, 190, 8) - contrast)


def _draw_pancreas(scene: _Scene, cavity: Field) -> None:
    """A curved tube: head right of the midline, body across the aorta, tail towards the spleen."""
    path: list[Triple] = [
        (33, 2, -20),
        (27, 7, -6),
        (12, 15, 4),
        (-10, 16, 9),
        (-32, 9, 14),
        (-54, -3, 18),
        (-70, -10, 22),
    ]
    shift = scene.rng.uniform(-4, 4, 3)
    path = [scene.vary((x + shift[0], y + 2 + shift[1] / 2, z + shift[2]), 2.5) for x, y, z in path]
    tube = scene.tube(path, (15, 15.5, 12, 12, 12, 12, 11))
    depth = tube + np.float32(1.0) * scene.noise(14.0)
    depth = _fit_volume(scene, depth, np.minimum(scene.free(1.5), cavity), scene.rng.uniform(72, 102))
    _draw_organ(
        scene,
        PANCREAS,
        depth,
        _parenchyma(scene, 95) - np.float32(8) * np.maximum(scene.noise(6.0) - np.float32(0.8), 0),
    )


def _draw_spleen(scene: _Scene, cavity: Field) -> None:
    """A crescent against the left rear wall, hollow towards the stomach."""
    shape = scene.ellipsoid(scene.vary((-101, -25, 20), 4.5), (30, 54, 46), (12, 0, -14 + scene.rng.uniform(-6, 6)))
    hollow = scene.ellipsoid((-53, 6, 22), (40, 42, 44))
    depth = _soft_minimum(shape, -hollow, 8.0) + np.float32(2.0) * scene.noise(30.0)
    room = np.minimum(scene.free(3.0), cavity - np.float32(2))
    _draw_organ(scene, SPLEEN, _fit_volume(scene, depth, room, scene.rng.uniform(165, 300)), _parenchyma(scene, 122))


def _liver_depth(scene: _Scene, cavity: Field, below: Field) -> Field:
    """Wall and diaphragm outside, an oblique visceral face inside: the left lobe lies high and in front."""
    tilt = scene.rng.uniform(-0.06, 0.06, 3)
    normal = np.asarray((0.60, 0.36, 0.72)) + tilt
    normal = (normal / np.linalg.norm(normal)).astype(np.float32)
    visceral = normal[0] * (scene.x + 13) + normal[1] * scene.y + normal[2] * scene.z
    visceral += np.float32(5) * scene.noise(45.0)
    ends = _soft_minimum(scene.x + np.float32(50), scene.z + np.float32(60), 12.0)
    shape = _soft_minimum(_soft_minimum(visceral, ends, 14.0), cavity, 14.0)
    return _soft_minimum(shape, below, 14.0) + np.float32(2) * scene.noise(30.0)


def _draw_liver(scene: _Scene, cavity: Field, below: Field) -> None:
    """The liver with its veins, and the gallbladder under it."""
    gallbladder = scene.ellipsoid(scene.vary((50, 32, -28), 4), (13, 21, 15), (20, 0, 0))
    scene.paint(gallbladder, 8.0)
    scene.reserve(gallbladder)
    depth = _liver_depth(scene, cavity, below)
    room = np.minimum(np.minimum(scene.free(2.0), cavity - np.float32(2)), below - np.float32(0.5))
    # The fat around pancreas and great vessels.
    retroperitoneum = scene.ellipsoid((-8, -8, -12), (52, 35, 38), (0, 0, 10)) + np.float32(3) * scene.noise(22.0)
    room = np.minimum(_soft_minimum(room, -retroperitoneum, 6.0), scene.z + np.float32(63))
    depth = _fit_volume(scene, depth, room, scene.rng.uniform(1220, 1420))
    # Where two independent smooth fields vanish together runs a curve: that is a vein.
    veins = np.exp(-(scene.noise(24.0) ** 2 + scene.noise(24.0) ** 2) / np.float32(0.06))
    inner = np.clip(depth / 10, 0, 1)
    _draw_organ(scene, LIVER, depth, _parenchyma(scene, 110) + 45 * veins * inner)


def _draw_hollow(scene: _Scene, depth: Field, gas_above: float, content: float) -> None:
    """A hollow organ in the space the others left: wall, content, and gas where it rises (the patient lies supine)."""
    depth = np.minimum(depth, scene.free(2.5))
    level = gas_above + 3 * scene.noise(60.0)
    scene.paint(depth, 65.0)
    scene.paint(depth - np.float32(3), content + 12 * scene.noise(9.0))
    scene.paint(np.minimum(depth - np.float32(3), scene.y - level), -950.0)
    scene.reserve(depth)


def _draw_stomach(scene: _Scene, cavity: Field, below: Field) -> None:
    """A bag between spleen and left liver lobe: high and far back on the left, low and in front at the midline."""
    rng = scene.rng
    path = [scene.vary(point, 4) for point in ((-52, -8, 40), (-62, 22, 24), (-50, 46, 4), (-14, 50, -10))]
    size = rng.uniform(0.85, 1.1)
    bag = scene.tube(path, [radius * size for radius in (22, 29, 23, 14)]) + np.float32(2) * scene.noise(25.0)
    room = np.minimum(cavity - np.float32(1), below - np.float32(1))
    _draw_hollow(scene, np.minimum(bag, room), rng.uniform(38, 56), rng.uniform(5, 40))


def _draw_bowel(scene: _Scene, cavity: Field) -> None:
    """Colon and loops of small bowel: what the network has to tell from the organs."""
    rng = scene.rng
    path = [(104, 0, -130), (98, 14, -48), (58, 55, -36), (0, 66, -34), (-62, 52, -22), (-103, 10, -12)]
    colon = scene.tube([scene.vary(point, 4) for point in (*path, (-108, -18, -130))], (17, 17, 14, 14, 14, 13, 13))
    haustra = 3 * np.cos((scene.x + scene.y + scene.z) * np.float32(2 * np.pi / 26))
    _draw_hollow(scene, np.minimum(colon + haustra, cavity), rng.uniform(52, 66), rng.uniform(-20, 40))
    region = scene.ellipsoid((-10, 25, -74), (92, 52, 64))
    loops = (scene.noise(17.0) + np.float32(0.55)) * np.float32(11)
    _draw_hollow(scene, np.minimum(np.minimum(loops, region), cavity), rng.uniform(50, 70), rng.uniform(25, 55))


def _add_noise(scene: _Scene) -> Field:
    """Blur of the scanner, then quantum noise: one part correlated by the reconstruction kernel, one part white."""
    blurred = gaussian_filter(scene.hu, (0.5, 0.5, 0.3), truncate=3.0)
    deviates = scene.rng.standard_normal((2, *scene.grid.shape), dtype=np.float32)
    correlated = gaussian_filter1d(gaussian_filter1d(deviates[0], 0.9, axis=0), 0.9, axis=1)
    strength = np.float32(scene.rng.uniform(0.85, 1.15))
    return blurred + strength * (np.float32(11) / correlated.std() * correlated + np.float32(9) * deviates[1])


def _in_file_axes(scene: _Scene, hu: Field) -> Phantom:
    """Store the axes as one of `ORIENTATIONS` runs, with the affine that says so."""
    orientation = str(scene.rng.choice(ORIENTATIONS))
    signs = np.asarray([1 if way in "RAS" else -1 for way in orientation])
    steps = signs * np.asarray(scene.grid.spacing)
    affine = np.diag((*steps, 1.0))
    middle = np.asarray((0.0, scene.rng.uniform(-20, 20), scene.rng.uniform(-400, 400)))
    affine[:3, 3] = np.round(middle - steps * (np.asarray(hu.shape) - 1) / 2, 3)
    flips = tuple(slice(None, None, int(sign)) for sign in signs)
    stored = np.clip(np.rint(hu), LOWEST_HU, HIGHEST_HU).astype(np.int16)
    return Phantom(np.ascontiguousarray(stored[flips]), np.ascontiguousarray(scene.labels[flips]), affine)


def make_phantom(rng: np.random.Generator, *, size: int = 128, slices: int = 24) -> Phantom:
    """Draw one abdomen.

    The field of view is 335 to 380 mm and the coverage 148 to 168 mm whatever the number of voxels, so that 128 voxels
    and 24 slices are 2.6 to 3.0 mm and 6.2 to 7.0 mm apart. All organs lie inside, each with slices without it.

    Args:
        rng: where every random number comes from; the same state gives the same phantom.
        size: voxels along both in-plane axes, at least 32.
        slices: number of slices, at least 12.

    Returns:
        The case, in one of the orientations of `ORIENTATIONS`.

    Raises:
        ConfigError: when the volume is too small for its organs to be resolved.
    """
    if size < 32 or slices < 12:
        message = f"A phantom needs size >= 32 and slices >= 12, got size {size} and slices {slices}: use more voxels."
        raise ConfigError(message)
    scene = _make_scene(rng, size, slices)
    _draw_table(scene)
    cavity, below = _draw_trunk(scene)
    _draw_spine(scene)
    _draw_chest(scene, cavity, below)
    _draw_vessels(scene)
    _draw_kidney(scene, LEFT_KIDNEY, -1, cavity)
    _draw_kidney(scene, RIGHT_KIDNEY, 1, cavity)
    _draw_pancreas(scene, cavity)
    _draw_spleen(scene, cavity)
    _draw_stomach(scene, cavity, below)
    _draw_liver(scene, cavity, below)
    _draw_bowel(scene, cavity)
    return _in_file_axes(scene, _add_noise(scene))


def _replace_file(path: Path, content: bytes) -> None:
    """Write under a temporary name beside `path`, then move it there in one step."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        message = f"A writable folder was expected for {path}, but: {error}. Choose another output folder."
        raise OutputError(message) from error


def _nifti_bytes(volume: NDArray[np.int16] | NDArray[np.uint8], affine: NDArray[np.float64]) -> bytes:
    """A compressed NIfTI file in millimetres; no time stamp, so that equal volumes are equal files."""
    image = nibabel.Nifti1Image(volume, affine)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)


def _write_case(output: Path, number: int, *, size: int, slices: int, seed: int) -> dict[str, str]:
    """Write image and labels of one case and return its datalist entry."""
    phantom = make_phantom(np.random.default_rng((seed, number)), size=size, slices=slices)
    case = f"phantom_{number:03d}"
    entry = {"case": case, "image": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz", "modality": "CT"}
    _replace_file(output / entry["image"], _nifti_bytes(phantom.hu, phantom.affine))
    _replace_file(output / entry["label"], _nifti_bytes(phantom.labels, phantom.affine))
    return entry


def write_phantoms(
    output: Path,
    *,
    training: int = 24,
    validation: int = 4,
    test: int = 6,
    size: int = 128,
    slices: int = 24,
    seed: int = 0,
) -> Path:
    """Write a data set of phantoms with its datalist.

    Cases are numbered through training, validation and test; each depends on the seed and its number alone, so that
    the same case comes out of a larger or smaller set, and a second call writes the same bytes.

    Args:
        output: folder that gets `images/`, `labels/` and `datalist.json`.
        training: number of training cases.
        validation: number of validation cases.
        test: number of test cases.
        size: voxels along both in-plane axes.
        slices: number of slices.
        seed: not negative; another seed gives other patients.

    Returns:
        The path of `datalist.json`.

    Raises:
        ConfigError: when a number of cases or the seed is negative, or the volume too small.
        OutputError: when `output` cannot be written to.
    """
    counts = {"training": training, "validation": validation, "test": test}
    if min(*counts.values(), seed) < 0:
        message = f"Numbers of cases and seed of 0 or more were expected, got {counts}, seed {seed}: correct them."
        raise ConfigError(message)
    output = Path(output)
    numbers = tqdm(range(sum(counts.values())), desc="phantoms", unit="case")
    entries = iter([_write_case(output, number, size=size, slices=slices, seed=seed) for number in numbers])
    splits = {split: [next(entries) for _ in range(count)] for split, count in counts.items()}
    datalist = {"name": "phantoms", "label_map": {str(value): name for value, name in LABEL_MAP.items()}, **splits}
    path = output / "datalist.json"
    _replace_file(path, (json.dumps(datalist, indent=2) + "\n").encode())
    return path
