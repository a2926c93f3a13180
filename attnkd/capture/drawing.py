"""Draws class-token attention over images; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from attnkd.capture.class_maps import ClassMaps, upsample

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_class_maps(
    names: Sequence[str],
    pictures: Tensor,
    shown: dict[str, ClassMaps],
    per_head: Tensor | None,
    merged_kl: Tensor,
    merge: str,
    temperatures: Sequence[float] = (1.0,),
    captions: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Two rows an image, teacher above student: the image, every head, merged, rollout; maps upsampled over the image.

    Args:
        names: of the images. pictures: [B, C, H, W], values 0 to 1.
        shown: the maps of 'teacher' and 'student'.
        per_head, merged_kl: as :func:`attnkd.capture.class_maps.class_kl` returns them, written over the student's maps.
        temperatures: of the merged maps.
        captions: for 'teacher', 'student' or both, a line below each image.
    """
    from matplotlib.figure import Figure

    heads = max(maps.rows.shape[1] for maps in shown.values())
    tempered = [f"{merge} of heads" + ("" if t == 1 else f", T = {t:g}") for t in temperatures]
    extra = 0 if shown["teacher"].rollout is None else 1
    columns, size = 1 + heads + len(tempered) + extra, (pictures.shape[-2], pictures.shape[-1])
    figure = Figure(figsize=(1.25 * columns + 0.8, 2.75 * len(names) + 0.7), dpi=130, layout="constrained")
    grid = figure.subplots(2 * len(names), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    for index, name in enumerate(names):
        pixels = pictures[index].permute(1, 2, 0).squeeze(-1).clamp(0, 1).cpu().numpy()
        for row, (who, maps) in enumerate(shown.items()):
            line = grid[2 * index + row]
            line[0].imshow(pixels, cmap="gray", vmin=0, vmax=1)
            line[0].set_ylabel(who, fontsize=9)
            if row == 0:
                line[0].set_title(name, fontsize=8)
            if captions is not None and who in captions:
                line[0].set_xlabel(captions[who][index], fontsize=7)
            cells = []  # title, map, KL, axes
            for head, values in enumerate(maps.heads_map[index]):
                kl = None if per_head is None or who == "teacher" else per_head[index, head]
                cells.append((f"head {head}", values, kl, line[1 + head]))
            for place, (title, values) in enumerate(zip(tempered, maps.merged_map[index], strict=True)):
                kl = None if who == "teacher" else merged_kl[index, place]
                cells.append((title, values, kl, line[1 + heads + place]))
            if maps.rollout_map is not None:
                cells.append(("rollout", maps.rollout_map[index], None, line[-1]))
            for title, values, kl, axes in cells:
                heat = upsample(values, size).cpu().numpy()
                if pixels.ndim == 2:  # strokes would shine through and be read as attention: outline them instead
                    axes.imshow(heat, cmap="inferno", vmin=0)
                    axes.contour(pixels, levels=[0.5], colors="deepskyblue", linewidths=0.9)
                else:
                    axes.imshow(pixels)
                    axes.imshow(heat, cmap="inferno", alpha=0.65, vmin=0)
                axes.set_title(title if kl is None else f"{title}\nKL {kl.item():.3f}", fontsize=8)
    figure.suptitle(
        "Attention of the class token over the patches; every map from 0 (dark) to its own maximum (bright)", fontsize=9
    )
    return figure
