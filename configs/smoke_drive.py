"""A small made-up drive in the layout of SPEC section 7: configs/smoke.yaml trains on it, nothing being downloaded."""
import json
import math
import pickle
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data import VIEWS, write_video

YAW = dict(zip(VIEWS, (0, -45, 45, -90, 90)))  # degrees to the right of the driving direction
CARS, EGO_SPEED, CAMERA_HEIGHT, FAR = 6, 8.0, 1.6, 75.0  # number, m/s, m, m


def write_drive(root, clips=4, frames=40, height=64, width=96, fps=10, seed=0, text_width=1024):
    """Writes a small made-up drive in the layout of SPEC section 7, unless it is there already.

    A road with lane marks and cars, colours drawn per clip and told by its text; lidar and HD map show the same scene.
    """
    root, settings = Path(root), [clips, frames, height, width, fps, seed, text_width]
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent) as scratch:  # a broken-off drive never gets the name
            drive = Path(scratch) / "drive"
            for i in range(clips):
                write_clip(drive, f"synthetic_{i:04d}", settings, np.random.default_rng([seed, i]))
            for i, view in enumerate(VIEWS):
                words = np.random.default_rng([seed, 1, i]).standard_normal((16, text_width), np.float32)
                write_pickle(drive / "cache" / f"prefix_{view}.pkl", words)
            (drive / "drive.json").write_text(json.dumps(settings))
            try:
                drive.rename(root)
            except OSError:
                if not root.exists():  # else another process finished first
                    raise
    note = root / "drive.json"
    if not note.is_file() or json.loads(note.read_text()) != settings:
        raise ValueError(f"{root} exists and is not the synthetic drive asked for; remove it or set data.root")
    return root


def write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol=4))


def write_clip(root, name, settings, rng):
    _, frames, height, width, fps, _, text_width = settings
    palette = rng.uniform(0, 255, (5, 3))                                              # sky, grass, road, two cars
    cars = np.stack([rng.choice([-3.6, 0.0, 3.6], CARS), rng.uniform(0, 70, CARS), rng.uniform(4, 14, CARS)], 1)

    def draw_view(view):
        pictures = render(frames, height, width, fps, math.radians(YAW[view]), palette, cars)
        for kind, picture in zip(("videos", "lidar", "hdmap"), pictures):
            write_video(root / kind / view / f"{name}_0.mp4", picture, fps)

    with ThreadPoolExecutor() as pool:
        list(pool.map(draw_view, VIEWS))
    words = np.random.default_rng(0).standard_normal((palette.size, text_width), np.float32)
    told = (palette.reshape(-1, 1) / 127.5 - 1).astype(np.float32) * words            # one row a colour channel
    write_pickle(root / "t5_xxl" / "pinhole_front" / f"{name}.pkl", [told])


def render(frames, height, width, fps, yaw, palette, cars):
    """Ray casts the road scene: camera, lidar and HD-map video, each uint8 (F, H, W, 3)."""
    across, down = [(np.arange(n) - (n - 1) / 2) / (width / 2) for n in (width, height)]
    u, v = np.meshgrid(across, down)
    # x right, y down, z ahead in metres; a ray's part along the camera's axis is 1, so its length is depth.
    rays = np.stack([math.cos(yaw) * u + math.sin(yaw), v, math.cos(yaw) - math.sin(yaw) * u])  # (3, H, W)
    rays = np.where(np.abs(rays) < 1e-6, 1e-6, rays)
    seconds = np.arange(frames)[:, None, None] / fps                                   # (F, 1, 1)
    depth = np.where(rays[1] > CAMERA_HEIGHT / FAR, CAMERA_HEIGHT / rays[1], np.inf) + 0 * seconds  # (F, H, W)
    ground = np.where(depth < FAR, depth, 0)
    x, z = rays[0] * ground, rays[2] * ground + EGO_SPEED * seconds
    edge = np.abs(np.abs(x) - 5.4) < 0.25
    mark = (np.abs(np.abs(x) - 1.8) < 0.2) & (z % 6 < 3)
    thing = np.where(ground == 0, 0, np.where(np.abs(x) < 5.4, 2, 1))                  # a row of the palette
    car = np.zeros(depth.shape, int)                                                   # 0: none
    for i, (lane, ahead, speed) in enumerate(cars):
        depth, car = park(depth, car, i + 1, rays, lane, (ahead + (speed - EGO_SPEED) * seconds + 10) % 80 - 10)
    thing = np.where(car > 0, 3 + car % 2, thing)
    edge, mark = [line & (ground > 0) & (car == 0) for line in (edge, mark)]
    outline = (car != np.roll(car, 1, 1)) | (car != np.roll(car, 1, 2))
    camera = np.where((edge | mark)[..., None], 240, palette[thing]) * (1 - depth.clip(0, FAR) / FAR / 2)[..., None]
    lidar = np.where(depth <= FAR, 255 * depth.clip(0, FAR) / FAR, 0)[..., None].repeat(3, -1)
    hdmap = np.zeros(camera.shape)
    for line, colour in ((edge, (255, 0, 0)), (mark, (0, 255, 0)), (outline, (0, 128, 255))):
        hdmap[line] = colour
    return [picture.round().astype(np.uint8) for picture in (camera, lidar, hdmap)]


def park(depth, car, number, rays, x, z):
    """Puts a car, a box around (x, z), in front of what the rays have met so far."""
    near, far = -np.inf, np.inf
    for centre, half, ray in zip((x, CAMERA_HEIGHT - 1.1, z), (0.9, 1.1, 2.2), rays):
        walls = (centre - half) / ray, (centre + half) / ray
        near, far = np.maximum(near, np.minimum(*walls)), np.minimum(far, np.maximum(*walls))
    hit = (near > 0.5) & (near < far) & (near < depth)
    return np.where(hit, near, depth), np.where(hit, number, car)
