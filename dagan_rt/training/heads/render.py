"""Rays against the head, hair, neck and shoulders; light; one picture and its depth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dagan_rt.training.heads.paint import hair_colour, paint_head
from dagan_rt.training.heads.person import Person, Scene
from dagan_rt.training.heads.shape import Face, normal, surface

FAR = 3.0
"""Depth of the background behind the middle of the head, in head radii."""

ARRIVED = 2e-4
"""A ray whose `surface` is this near to zero has arrived: less than a hundredth of a pixel at 128 pixels."""

_PIVOT = np.array([0.0, 0.45, -0.25])

Rays = np.ndarray | list[np.ndarray]
Radii = tuple[float, float, float]


@dataclass(frozen=True)
class Placement:
    """Head to camera: point_camera = rotation @ point_head + offset; the camera sits at (0, 0, distance)."""

    rotation: np.ndarray
    offset: np.ndarray


def place(pose: np.ndarray, shift: np.ndarray) -> Placement:
    """Yaw > 0 turns the nose to the image's right, pitch > 0 lifts it, roll > 0 turns the head clockwise."""
    yaw, pitch, roll = np.radians(np.asarray(pose, np.float64))
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    nod = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    tilt = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    rotation = tilt @ nod @ turn
    # A head turns about the top of the neck, not about its own middle.
    offset = np.asarray(shift, np.float64) + np.array([0.0, -0.12, 0.0]) + _PIVOT - rotation @ _PIVOT
    return Placement(rotation, offset)


def project(points: np.ndarray, placement: Placement, scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Head points [..., 3] to image positions [..., 2] in [-1, 1] and depth [...] along the optical axis."""
    camera = points @ placement.rotation.T + placement.offset
    depth = scene.distance - camera[..., 2]
    return camera[..., :2] / (depth[..., None] * scene.half_view), depth


class Canvas:
    """A picture in linear light [3, H*W] with its depth [H*W], painted by solids that test depth softly."""

    def __init__(self, scene: Scene, size: int, background: np.ndarray):
        self.size = size
        axis = np.linspace(-1.0, 1.0, size, dtype=np.float32) * np.float32(scene.half_view)
        self.x = np.ascontiguousarray(np.broadcast_to(axis, (size, size))).reshape(-1)
        self.y = np.repeat(axis, size)
        self.pixel = 2.0 * scene.half_view * scene.distance / (size - 1)
        self.colour = background.copy()
        self.depth = np.full(size * size, scene.distance + FAR, np.float32)

    def add(self, index: np.ndarray, cover: np.ndarray, depth: np.ndarray, colour: np.ndarray) -> None:
        """Blend `colour` [3, N] at the pixels `index`, hidden where something nearer already is."""
        behind = self.depth[index]
        cover = cover * np.clip((behind - depth) * 25.0 + 0.5, 0.0, 1.0)
        old = self.colour[:, index]
        self.colour[:, index] = old + cover * (colour - old)
        self.depth[index] = np.where(cover > 0.5, depth, behind)


def render(
    person: Person, scene: Scene, face: Face, pose: np.ndarray, shift: np.ndarray, size: int, background: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One frame: uint8 [H, W, 3] and depth float32 [H, W]."""
    canvas = Canvas(scene, size, background)
    placement = place(pose, shift)
    _add_body(canvas, person, scene, placement, shift)
    if person.hair_style in ("long", "bob"):
        _add_back_hair(canvas, person, scene, placement)
    if person.hair_style not in ("long", "bob"):
        for side in (-1.0, 1.0):
            _add_ear(canvas, person, scene, placement, side)
    _add_head(canvas, person, scene, face, placement)
    shown = np.sqrt(np.clip(canvas.colour, 0.0, 1.0)) * 255.0 + 0.5
    frame = np.ascontiguousarray(shown.astype(np.uint8).T).reshape(size, size, 3)
    return frame, canvas.depth.reshape(size, size)


def light_up(scene: Scene, normals: np.ndarray, albedo: np.ndarray, gloss: float | np.ndarray) -> np.ndarray:
    """Soft light from one direction: wrapped diffuse, sky from above, a broad highlight."""
    light = scene.light
    facing = light[0] * normals[0] + light[1] * normals[1] + light[2] * normals[2]
    wrapped = np.clip((facing + 0.30) * (1.0 / 1.30), 0.0, 1.0)
    wrapped = wrapped * (0.55 + 0.45 * wrapped)
    sky = scene.ambient * (0.85 - 0.25 * normals[1])
    shine = light + np.array([0.0, 0.0, 1.0], np.float32)
    shine = shine / np.float32(np.sqrt((shine * shine).sum()))
    lobe = np.clip(shine[0] * normals[0] + shine[1] * normals[1] + shine[2] * normals[2], 0.0, 1.0)
    lobe = lobe * lobe
    lobe = lobe * lobe
    lobe = lobe * lobe
    lobe = lobe * lobe
    diffuse = 0.95 * wrapped * scene.light_colour[:, None] + sky
    return albedo * diffuse + gloss * lobe * lobe


def _add_head(canvas: Canvas, person: Person, scene: Scene, face: Face, placement: Placement) -> None:
    index, origin, ray = _rays_near(canvas, scene, placement, (person.width * 1.3, 1.38, person.depth * 1.4))
    nearest = _closest(origin, ray, (person.width, 1.0, person.depth))
    edge = _lowest(face, origin, ray, nearest, deep=canvas.pixel)
    depth, miss = trace(face, person, origin, ray)
    cover = np.clip(0.5 - edge * (1.0 / (1.25 * canvas.pixel)), 0.0, 1.0)
    # The nose can stand out beyond the silhouette of the body: a ray that hits it there covers its pixel.
    hit = (miss < 0.2 * canvas.pixel) & (depth < nearest)
    cover = np.where(hit & (edge > canvas.pixel), 1.0, cover)
    keep = cover > 0.0
    index, ray, cover = index[keep], ray[:, keep], cover[keep]
    # A ray that only grazes the edge has no hit: shade it where it comes closest.
    depth = np.where(miss[keep] < 0.02, depth[keep], nearest[keep])
    x, y, z = (origin[axis] + depth * ray[axis] for axis in range(3))
    normals = normal(face, x, y, z)
    albedo, gloss = paint_head(face, x, y, z, canvas.pixel)
    turned = placement.rotation.astype(np.float32) @ normals
    canvas.add(index, cover, depth, light_up(scene, turned, albedo, gloss))


def trace(face: Face, person: Person, origin: np.ndarray, ray: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Follow rays (origin [3], ray [3, N], one depth unit long) to the skin: depth [N], |surface| left there [N]."""
    depth = _enter(origin, ray, (person.width * 1.12 + 0.04, person.crown * 1.02 + 0.12, person.depth * 1.06 + 0.22))
    left = _along(face, origin, ray, depth)
    going, at, value = np.arange(depth.size), depth, left  # the rays still on their way
    step = 0.55 * value
    for turn in range(10):
        at = at + step
        before, value = value, _along(face, origin, ray, at)
        if turn < 4:
            step = 0.6 * value
            continue
        depth[going], left[going] = at, value
        # Most rays arrive within a few steps; what goes on is the edge, and rays that miss.
        keep = np.abs(value) > ARRIVED
        going, at, ray, step = going[keep], at[keep], ray[:, keep], step[keep]
        before, value = before[keep], value[keep]
        fall = before - value
        # Secant steps where the ray still sinks into the head, plain steps elsewhere.
        secant = value * step / np.where(np.abs(fall) > 1e-7, fall, 1e-7)
        step = np.where(fall * step > 0.0, np.clip(secant, -0.08, 0.10), 0.6 * value)
    return depth, np.abs(left)


def _along(face: Face, origin: np.ndarray, ray: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """`surface` at a depth along each ray."""
    return surface(face, origin[0] + depth * ray[0], origin[1] + depth * ray[1], origin[2] + depth * ray[2])


def _lowest(face: Face, origin: np.ndarray, ray: np.ndarray, middle: np.ndarray, deep: float) -> np.ndarray:
    """The surface value where the ray is deepest: from a parabola through three samples.

    Rays already below -`deep` in the middle are surely inside; their value there is all that is asked.
    """
    half = 0.22
    lowest = _along(face, origin, ray, middle)
    edge = np.flatnonzero(lowest > -deep)
    ray, middle, centre = ray[:, edge], middle[edge], lowest[edge]
    before, after = (_along(face, origin, ray, middle + offset) for offset in (-half, half))
    bend = np.maximum(before + after - 2.0 * centre, 1e-3)
    vertex = middle - half * np.clip(0.5 * (after - before) / bend, -1.5, 1.5)
    lowest[edge] = np.minimum(_along(face, origin, ray, vertex), centre)
    return lowest


def _rays_near(
    canvas: Canvas, scene: Scene, placement: Placement, radii: Radii
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rays in head coordinates for the pixels that an ellipsoid about the head covers."""
    rotation = placement.rotation.astype(np.float32)
    origin = (placement.rotation.T @ (np.array([0.0, 0.0, scene.distance]) - placement.offset)).astype(np.float32)
    ray = [rotation[0, axis] * canvas.x + rotation[1, axis] * canvas.y - rotation[2, axis] for axis in range(3)]
    index = np.flatnonzero(_discriminant(origin, ray, radii)[2] > 0.0)
    return index, origin, np.stack([part[index] for part in ray])


def _discriminant(origin: np.ndarray, ray: Rays, radii: Radii) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of |origin + s ray| = 1 in an ellipsoid's own lengths: the s² term, half the s term, the discriminant."""
    scale = [np.float32(1.0 / radius) for radius in radii]
    o = [origin[axis] * scale[axis] for axis in range(3)]
    d = [ray[axis] * scale[axis] for axis in range(3)]
    square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2]
    along = o[0] * d[0] + o[1] * d[1] + o[2] * d[2]
    rest = o[0] * o[0] + o[1] * o[1] + o[2] * o[2] - np.float32(1.0)
    return square, along, along * along - square * rest


def _enter(origin: np.ndarray, ray: Rays, radii: Radii) -> np.ndarray:
    square, along, inside = _discriminant(origin, ray, radii)
    return (-along - np.sqrt(np.maximum(inside, 0.0))) / square


def _closest(origin: np.ndarray, ray: Rays, radii: Radii) -> np.ndarray:
    square, along, _ = _discriminant(origin, ray, radii)
    return -along / square


def _ellipsoid(
    canvas: Canvas, origin: np.ndarray, ray: Rays, radii: Radii
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels that see an ellipsoid about the origin: index, coverage, depth, points, normals [3, N]."""
    square, along, inside = _discriminant(origin, ray, radii)
    # The closest pass of the ray, in radii: one at the silhouette.
    index = np.flatnonzero(inside > -0.25 * square)
    square, along, inside = square[index], along[index], inside[index]
    passed = np.sqrt(np.maximum(1.0 - inside / square, 0.0))
    cover = np.clip(0.5 - (passed - 1.0) * (min(radii[0], radii[1]) / canvas.pixel), 0.0, 1.0)
    seen = cover > 0.0
    index, cover = index[seen], cover[seen]
    depth = ((-along - np.sqrt(np.maximum(inside, 0.0))) / square)[seen]
    points = np.stack([origin[axis] + depth * ray[axis][index] for axis in range(3)])
    normals = points / np.array(radii, np.float32)[:, None] ** 2
    normals = normals / np.sqrt((normals * normals).sum(axis=0) + 1e-9)
    return index, cover, depth, points, normals


def _camera_rays(canvas: Canvas, scene: Scene, centre: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    origin = (np.array([0.0, 0.0, scene.distance]) - centre).astype(np.float32)
    return origin, [canvas.x, canvas.y, np.full_like(canvas.x, -1.0)]


def _add_body(canvas: Canvas, person: Person, scene: Scene, placement: Placement, shift: np.ndarray) -> None:
    """Shoulders and neck follow the head a little but do not turn with it."""
    sway, nearer = 0.35 * float(shift[0]), float(shift[2])
    centre = np.array([sway, 2.42 - 0.12 + 0.5 * float(shift[1]), nearer - 0.40])
    neck_foot = centre + np.array([0.0, -0.75, 0.02])
    for radii, drop in (((person.shoulder, 0.98, 0.62), 0.0), ((0.95, 0.80, 0.50), -0.38)):
        at = centre + np.array([0.0, drop, 0.0])
        origin, ray = _camera_rays(canvas, scene, at)
        index, cover, depth, points, normals = _ellipsoid(canvas, origin, ray, radii)
        if index.size:
            x, y = points[0], points[1] + np.float32(at[1] - neck_foot[1])
            opening = (x / 0.55) ** 2 + ((y - 0.05) / (0.22 + scene.collar)) ** 2
            bare = np.clip((1.0 - opening) * (0.2 / canvas.pixel) + 0.5, 0.0, 1.0)
            rim = np.exp(-(((np.sqrt(opening) - 1.05) / 0.06) ** 2))
            cloth = scene.cloth[:, None] * (1.0 - 0.25 * rim)
            albedo = cloth + bare * (person.skin[:, None] * 0.92 - cloth)
            canvas.add(index, cover, depth, light_up(scene, normals, albedo, 0.02))
    _add_neck(canvas, person, scene, placement, neck_foot)


def _add_neck(canvas: Canvas, person: Person, scene: Scene, placement: Placement, foot: np.ndarray) -> None:
    """A tube from the base of the skull to between the shoulders."""
    top = placement.rotation @ np.array([0.0, 0.55, -0.22]) + placement.offset
    span = foot + np.array([0.0, 0.35, 0.0]) - top
    length = float(np.sqrt((span * span).sum()))
    axis = (span / length).astype(np.float32)
    origin = (np.array([0.0, 0.0, scene.distance]) - top).astype(np.float32)
    index = np.flatnonzero(
        np.abs(canvas.x * np.float32(scene.distance) - np.float32(0.5 * (top[0] + foot[0]))) < 1.1 * person.neck + 0.35
    )
    ray = np.stack([canvas.x[index], canvas.y[index], np.full(index.size, -1.0, np.float32)])
    along_ray = axis @ ray
    along_origin = float(axis @ origin)
    d = ray - axis[:, None] * along_ray
    o = (origin - axis * np.float32(along_origin))[:, None]
    square, half, rest = (d * d).sum(axis=0), (o * d).sum(axis=0), (o * o).sum(axis=0)
    passed = np.sqrt(np.maximum(rest - half * half / square, 0.0))
    depth = (-half - np.sqrt(np.maximum(person.neck**2 - passed * passed, 0.0) * square)) / square
    down = along_origin + depth * along_ray
    cover = np.clip(0.5 - (passed - person.neck) * (1.0 / canvas.pixel), 0.0, 1.0)
    cover = cover * np.clip(down * 8.0, 0.0, 1.0) * np.clip((length + 0.1 - down) * 8.0, 0.0, 1.0)
    seen = cover > 0.0
    normals = ((o + depth * d) * (1.0 / person.neck))[:, seen]
    # The chin keeps the light off the upper neck.
    shade = 0.50 + 0.45 * np.clip((down[seen] - 0.25) * 1.5, 0.0, 1.0)
    albedo = person.skin[:, None] * 0.95 * shade
    canvas.add(index[seen], cover[seen], depth[seen], light_up(scene, normals, albedo, 0.0))


def _part_rays(
    canvas: Canvas, scene: Scene, placement: Placement, centre: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    rotation = placement.rotation.astype(np.float32)
    origin = placement.rotation.T @ (np.array([0.0, 0.0, scene.distance]) - placement.offset) - centre
    ray = [rotation[0, axis] * canvas.x + rotation[1, axis] * canvas.y - rotation[2, axis] for axis in range(3)]
    return origin.astype(np.float32), ray


def _add_ear(canvas: Canvas, person: Person, scene: Scene, placement: Placement, side: float) -> None:
    centre = np.array([side * (person.width * 0.97 + 0.01), 0.08, -0.06])
    origin, ray = _part_rays(canvas, scene, placement, centre)
    radii = (0.085 * person.ear, 0.20 * person.ear, 0.13 * person.ear)
    index, cover, depth, points, normals = _ellipsoid(canvas, origin, ray, radii)
    if not index.size:
        return
    hollow = np.exp(-((points[1] / 0.10) ** 2) - (points[2] - 0.07) ** 2 / 0.006)
    albedo = person.skin[:, None] * np.array([[0.98], [0.88], [0.86]], np.float32) * (1.0 - 0.45 * hollow)
    turned = placement.rotation.astype(np.float32) @ normals
    canvas.add(index, cover, depth, light_up(scene, turned, albedo, 0.02))


def _add_back_hair(canvas: Canvas, person: Person, scene: Scene, placement: Placement) -> None:
    """Hair that falls behind the face: the rear part of an ellipsoid, cut by a plane behind the cheeks."""
    long = person.hair_style == "long"
    centre = np.array([0.0, 0.42 if long else 0.12, -0.20])
    radii = (person.width + 0.22, 1.35 if long else 1.08, 0.80)
    origin, ray = _part_rays(canvas, scene, placement, centre)
    index, cover, depth, points, normals = _ellipsoid(canvas, origin, ray, radii)
    if not index.size:
        return
    plane = np.float32(0.22)
    ahead = points[2] > plane
    to_plane = (plane - origin[2]) / ray[2][index]
    depth = np.where(ahead, to_plane, depth)
    points = np.stack([origin[axis] + depth * ray[axis][index] for axis in range(3)])
    albedo = hair_colour(person, points[0], points[1], points[2], canvas.pixel)
    albedo = albedo * np.where(ahead, 0.35 + 0.65 * np.clip((np.abs(points[0]) - 0.45) * 2.5, 0.0, 1.0), 1.0)
    turned = placement.rotation.astype(np.float32) @ normals
    canvas.add(index, cover, depth, light_up(scene, turned, albedo, 0.03))


def draw_background(scene: Scene, size: int) -> np.ndarray:
    """A soft, out-of-focus backdrop in linear light, float32 [3, H*W]."""
    axis = np.linspace(-1.0, 1.0, size, dtype=np.float32)
    x, y = np.broadcast_to(axis, (size, size)).reshape(-1), np.repeat(axis, size)
    ramp = np.clip(0.5 + 0.45 * (scene.gradient[0] * x + scene.gradient[1] * y), 0.0, 1.0)
    first, second = scene.background[0][:, None], scene.background[1][:, None]
    colour = first + ramp * (second - first)
    for blob in scene.blobs:
        away = np.sqrt((x - blob[0]) ** 2 + (y - blob[1]) ** 2) / blob[2]
        disc = 1.0 / (1.0 + np.exp(np.clip((away - 1.0) / blob[3], -30.0, 30.0)))
        colour = colour + 0.55 * disc * (blob[4:7, None] - colour)
    return (colour * (1.0 - scene.vignette * np.clip(x * x + y * y, 0.0, 2.0) * 0.6)).astype(np.float32)
