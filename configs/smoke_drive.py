"""A small made-up drive in the layout of a Waymo conversion, which configs/smoke.yaml trains on.

A street with bends, crossings, houses and cars. Text tells the colours, lidar and HD map tell where
everything is, and the camera shows both: what the one tells, the other does not.
"""

import json
import math
import multiprocessing
import pickle
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.video import ffmpeg
from data import VIEWS

YAW = dict(zip(VIEWS, (0, -45, 45, -90, 90)))  # degrees to the right of the driving direction
FAR = 75.0  # m, the range of the lidar
CAMERA_HEIGHT = 1.6  # m
FOCAL = 1.2  # in half widths of the picture
LANE, VERGE = 3.6, 2.0  # widths, m
CROSSING, BLOCK = 5.0, 12.0  # half the width of a crossing road, the length of a house, m

# What text tells the colour of, and the range of its red, green and blue.
COLOURS = {"sky": (190, 255), "verge": (90, 170), "road": (25, 60), "house": (50, 110),
           "car": (0, 255)}
SKY, GREEN, ROAD, HOUSE, CAR, LINE, GLASS = range(7)  # rows of the palette; two never change
HDMAP_COLOURS = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 128, 255)], np.uint8)
NONE, EDGE, MARK, OUTLINE = range(4)  # rows of the HD map's colours
AT_ONCE = 12  # clips rendered and then encoded together


@dataclass
class Car:
    lane: float  # m to the right of the road's centre
    ahead: float  # m in front of us at the start
    speed: float  # m/s
    size: tuple[float, float, float]  # width, height, length in m


@dataclass
class Scene:
    palette: np.ndarray  # (7, 3)
    cars: list[Car]
    half_width: float = LANE  # of the road, m
    lane: float = LANE / 2  # ours, m to the right of the centre
    speed: float = 8.0  # ours, m/s
    bend: float = 0.0  # the largest slope of the road's centre
    bend_length: float = 100.0  # m from one right bend to the next
    bend_phase: float = 0.0
    crossing: float = 30.0  # m ahead, and every crossing_gap from there
    crossing_gap: float = 1000.0
    houses: np.ndarray = None  # (2, n) heights along the left and the right side, 0: an open field

    def centre(self, z):  # of the road, z metres along it
        turn = self.bend_length / (2 * np.pi)
        return self.bend * turn * np.sin(z / turn + self.bend_phase)

    def heading(self, z):  # radians to the right
        turn = self.bend_length / (2 * np.pi)
        return np.arctan(self.bend * np.cos(z / turn + self.bend_phase))

    def to_crossing(self, z):  # m from the middle of the nearest one
        half = self.crossing_gap / 2
        return np.abs((z - self.crossing + half) % self.crossing_gap - half)

    def height(self, x, z):  # of the house that stands there, 0: none
        aside = x - self.centre(z)
        block = np.floor(z / BLOCK).astype(int) % self.houses.shape[1]
        free = np.abs(aside) < self.half_width + VERGE
        free |= self.to_crossing(z) < CROSSING + VERGE
        return np.where(free, 0, self.houses[(aside > 0).astype(int), block])


def drive_for(cfg):
    """The drive that a config with `data.root: synthetic` trains on, written at its first use."""
    d, views = cfg.data, 1 if cfg.data.views == 1 else len(VIEWS)
    root = Path(f"datasets/synthetic_drive_{d.height}x{d.width}_{views}_views")
    return write_drive(root, clips=136 // views, frames=d.num_frames, height=d.height,
                       width=d.width, text_width=cfg.model.crossattn_emb_channels, views=views)


def write_drive(root, clips=4, frames=40, height=64, width=96, fps=10, seed=0, text_width=1024,
                views=5):
    """Writes a drive under `root`, unless it is there already."""
    root, settings = Path(root), [clips, frames, height, width, fps, seed, text_width, views]
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        # A broken-off drive never gets the name.
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:
            drive = Path(scratch) / "drive"
            parts = [range(clips)[i : i + AT_ONCE] for i in range(0, clips, AT_ONCE)]
            with ThreadPoolExecutor(3) as pool:  # ffmpeg runs beside our own work
                list(pool.map(lambda part: write_clips(drive, part, settings), parts))
            for i, view in enumerate(VIEWS):
                rng = np.random.default_rng([seed, 1, i])
                words = rng.standard_normal((16, text_width), np.float32)
                write_pickle(drive / "cache" / f"prefix_{view}.pkl", words)
            (drive / "drive.json").write_text(json.dumps(settings))
            try:
                drive.rename(root)
            except OSError:
                if not root.exists():  # else another process finished first
                    raise
    note = root / "drive.json"
    if not note.is_file() or json.loads(note.read_text()) != settings:
        raise ValueError(f"{root} exists and is not the synthetic drive asked for; remove it or "
                         "set data.root")
    return root


def write_drives(folder, count, frames, cfg, first_seed):
    """`count` drives of 64 clips, a process each: what tokenizer and base are trained on."""
    d, width = cfg.data, cfg.model.crossattn_emb_channels
    jobs = [(Path(folder) / f"drive_{seed}", 64, frames, d.height, d.width, 10, seed, width, 1)
            for seed in range(first_seed, first_seed + count)]
    with multiprocessing.get_context("fork").Pool() as pool:  # so before CUDA is used
        return pool.starmap(write_drive, jobs)


def write_clips(root, numbers, settings):
    _, frames, height, width, fps, seed, text_width, views = settings
    scenes = [draw_scene(np.random.default_rng([seed, number])) for number in numbers]
    for view in list(VIEWS)[:views]:
        rendered = [render(scene, frames, height, width, fps, math.radians(YAW[view]))
                    for scene in scenes]
        for kind, videos in zip(("videos", "lidar", "hdmap"), zip(*rendered)):
            write_videos(root / kind / view, numbers[0], np.stack(videos), fps)
    for number, scene in zip(numbers, scenes):
        told = tell(scene.palette, text_width)
        write_pickle(root / "t5_xxl" / "pinhole_front" / f"synthetic_{number:04d}.pkl", [told])


def write_videos(folder, first, videos, fps):
    """Writes uint8 (N, F, H, W, 3) as clips `first` and on, all by one ffmpeg: to start one takes
    longer than to encode a small clip."""
    folder.mkdir(parents=True, exist_ok=True)
    count, frames, height, width = videos.shape[:4]
    cuts = ",".join(str(frames * i) for i in range(1, count + 1))
    command = [ffmpeg(encoder=True), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s",
               f"{width}x{height}", "-r", str(fps), "-i", "-", "-c:v", "libx264", "-threads", "1",
               "-preset", "ultrafast", "-crf", "16", "-pix_fmt", "yuv420p", "-g", str(frames),
               "-keyint_min", str(frames), "-f", "segment", "-segment_frames", cuts,
               "-segment_start_number", str(first), "-reset_timestamps", "1",
               "synthetic_%04d_0.mp4"]
    done = subprocess.run(command, input=videos.tobytes(), cwd=folder, capture_output=True,
                          start_new_session=True)
    if done.returncode:
        message = done.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{command[0]} could not write clips to {folder}: {message}")


def tell(palette, text_width):
    """The text of a clip, a row for each thing: its name, and how red, green and blue it is."""
    words = np.random.default_rng(0).standard_normal((len(COLOURS) + 3, text_width), np.float32)
    names, channels = words[:-3], words[-3:]
    return names + (palette[:len(COLOURS)] / 127.5 - 1).astype(np.float32) @ channels


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=4))


def draw_scene(rng):
    low, high = np.array(list(COLOURS.values())).T[..., None]
    palette = np.concatenate([rng.uniform(low, high, (len(COLOURS), 3)), [[240] * 3, [30] * 3]])
    lanes = rng.choice([2, 4])
    middles = (np.arange(lanes) - (lanes - 1) / 2) * LANE
    ours, speed = rng.integers(lanes), rng.uniform(2, 10)
    speeds = speed + rng.uniform(-4, 4, lanes)
    speeds[ours] = speed  # nobody drives into us
    cars = []
    for ahead in np.arange(7, 77, 14):
        lane = rng.integers(lanes)
        size = (1.9, 1.6, 4.4) if rng.random() < 0.4 else (2.4, 2.8, 6.5)
        cars.append(Car(middles[lane], ahead + rng.uniform(0, 3), speeds[lane], size))
    houses = rng.uniform(4, 12, (2, 20)) * (rng.random((2, 20)) < 0.7)
    houses = houses.repeat(2, 1)
    bend = rng.uniform(0, 0.8), rng.uniform(60, 160), rng.uniform(0, 2 * math.pi)
    crossings = rng.uniform(-20, 60), rng.uniform(60, 100)
    return Scene(palette, cars, lanes * LANE / 2, middles[ours], speed, *bend, *crossings, houses)


def render(scene, frames, height, width, fps, yaw=0.0):
    """Camera, lidar and HD-map video, each uint8 (F, H, W, 3); `yaw` in radians to the right."""
    pictures = [render_moment(scene, frame / fps, height, width, yaw) for frame in range(frames)]
    return [np.stack(video) for video in zip(*pictures)]


def render_moment(scene, seconds, height, width, yaw):
    """Casts four rays a pixel; H and W count rays here, and the pictures (H/2, W/2, 3)."""
    u, v = [(np.arange(2 * n, dtype=np.float32) - n + 0.5) / (width * FOCAL)
            for n in (width, height)]
    rows = v[:, None]                                                              # (H, 1)
    z0 = float(scene.speed * seconds)
    x0 = float(scene.centre(z0) + scene.lane)
    # Where a column's rays start and how far they go in a metre of depth, seen from above:
    # x to the right, z along the road.
    cos, sin = math.cos(scene.heading(z0) + yaw), math.sin(scene.heading(z0) + yaw)
    columns = x0, z0, cos * u + sin, cos - sin * u

    depth = np.full((2 * height, 2 * width), np.inf, np.float32)
    thing = np.full(depth.shape, SKY, np.int8)
    lines = np.full(depth.shape, NONE, np.int8)
    draw_ground(scene, rows, columns, depth, thing, lines)
    draw_houses(scene, rows, columns, depth, thing)
    number = np.zeros(depth.shape, np.int8)  # of the car that is seen, 0: none
    for i, car in enumerate(scene.cars, 1):
        draw_car(scene, car, i, seconds, rows, columns, depth, thing, number)

    light = np.where(thing == SKY, 1, 1 - depth.clip(0, FAR) / FAR / 2)
    camera = scene.palette.astype(np.float32)[thing] * light[..., None]
    camera = camera[::2] + camera[1::2]
    camera = (camera[:, ::2] + camera[:, 1::2]) / 4
    lidar = np.where(depth <= FAR, 255 * depth / FAR, 0)[1::2, ::2, None].repeat(3, -1)
    outline = (number != np.roll(number, 1, 0)) | (number != np.roll(number, 1, 1))
    lines = np.where(outline, OUTLINE, lines * (thing == LINE))
    lines = np.maximum(lines[::2], lines[1::2])
    hdmap = HDMAP_COLOURS[np.maximum(lines[:, ::2], lines[:, 1::2])]
    return [picture.round().astype(np.uint8) for picture in (camera, lidar, hdmap)]


def draw_ground(scene, rows, columns, depth, thing, lines):
    """Road, verge and lines, into the arrays of what each ray has met so far."""
    x0, z0, dx, dz = columns
    top = int((rows < CAMERA_HEIGHT / FAR).sum())
    depth[top:] = far = CAMERA_HEIGHT / rows[top:]
    x, z = x0 + far * dx, z0 + far * dz                                            # (H - top, W)
    aside, along = np.abs(x - scene.centre(z)), scene.to_crossing(z) > CROSSING
    thing[top:] = np.where((aside < scene.half_width) | ~along, ROAD, GREEN)
    edge = np.abs(aside - scene.half_width + 0.3) < 0.2
    mark = np.abs((aside + LANE / 2) % LANE - LANE / 2) < 0.15
    mark &= aside < scene.half_width - 1
    lines[top:] = np.where(along, EDGE * edge + MARK * mark, NONE)
    thing[lines > 0] = LINE


def draw_houses(scene, rows, columns, depth, thing):
    """The first house in each column's way hides what is behind it."""
    x0, z0, dx, dz = columns
    steps = np.geomspace(1, FAR, 100, dtype=np.float32)[:, None]
    tall = scene.height(x0 + steps * dx, z0 + steps * dz)                          # (steps, W)
    first = (tall > 0).argmax(0)
    after, before = steps[first, 0], steps[np.maximum(first - 1, 0), 0]            # (W,)
    for _ in range(6):  # where exactly between two steps it begins
        middle = (before + after) / 2
        inside = scene.height(x0 + middle * dx, z0 + middle * dz) > 0
        before = np.where(inside, before, middle)
        after = np.where(inside, middle, after)
    wall = np.where(tall.any(0), after, np.inf)
    top = (CAMERA_HEIGHT - scene.height(x0 + after * dx, z0 + after * dz)) / wall
    hit = (rows >= top) & (wall < depth)
    np.copyto(depth, wall, where=hit)
    thing[hit] = HOUSE


def draw_car(scene, car, number, seconds, rows, columns, depth, thing, numbers):
    """A box on the road, turned with it; dark glass and tyres on its sides."""
    x0, z0, dx, dz = columns
    z = z0 + (car.ahead + (car.speed - scene.speed) * seconds + 12) % 90 - 12
    x, angle = scene.centre(z) + car.lane, scene.heading(z)
    cos, sin = math.cos(angle), math.sin(angle)
    width, height, length = car.size
    axes = (cos, -sin, width), (sin, cos, length)  # of the car, seen from above
    near, far = -np.inf, np.inf                                                    # (W,)
    for to_x, to_z, size in axes:
        start, step = to_x * (x0 - x) + to_z * (z0 - z), to_x * dx + to_z * dz
        step = np.where(np.abs(step) < 1e-6, 1e-6, step)
        walls = (-size / 2 - start) / step, (size / 2 - start) / step
        near = np.maximum(near, np.minimum(*walls))
        far = np.minimum(far, np.maximum(*walls))
    met = np.flatnonzero((near > 0.5) & (near < far))
    if not len(met):
        return
    seen = slice(met[0], met[-1] + 1)  # a box is convex: nothing else is between these columns
    near, far, top = near[seen], far[seen], CAMERA_HEIGHT - height
    side = (rows >= top / near) & (rows <= CAMERA_HEIGHT / near)
    roof = (top > 0) & (rows < top / near) & (rows >= top / far)
    distance = np.where(roof, top / rows, near).astype(np.float32)
    hit = (side | roof) & (distance < depth[:, seen])
    up = (CAMERA_HEIGHT - rows * near) / height  # part of its height
    dark = side & ((up < 0.15) | (up > 0.55) & (up < 0.9))
    np.copyto(depth[:, seen], distance, where=hit)
    np.copyto(thing[:, seen], np.where(dark, GLASS, CAR).astype(np.int8), where=hit)
    numbers[:, seen][hit] = number
