"""What happened when, as a picture: a bar for each stage, a line for each event."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _LEFT, _ROW, _TOP, _EVENT = 1400, 190, 34, 60, 20
_BAR, _LOST, _OTHER, _GRID, _TEXT = "#4878a8", "#c03028", "#2e7d32", "#dddddd", "#222222"


@dataclass
class Timeline:
    """Events of one run, in seconds since it began."""

    title: str
    began: float = field(default_factory=time.monotonic)
    bars: dict[str, list[float]] = field(default_factory=dict)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def begin(self, name: str) -> None:
        """A stage begins."""
        self.bars[name] = [self._now()]

    def end(self, name: str) -> None:
        """A stage ends."""
        self.bars[name].append(self._now())

    def mark(self, event: str) -> float:
        """Something happens; when, on this timeline."""
        self.marks.append((self._now(), event))
        return self.marks[-1][0]

    def draw(self, path: Path) -> None:
        """Write the picture as a PNG."""
        total = self._now()
        height = _TOP + _ROW * len(self.bars) + _EVENT * len(self.marks) + 70
        image = Image.new("RGB", (_WIDTH, height), "white")
        draw = ImageDraw.Draw(image)
        font, large = ImageFont.load_default(15), ImageFont.load_default(20)
        draw.text((16, 14), self.title, fill=_TEXT, font=large)

        def across(seconds: float) -> float:
            return _LEFT + (_WIDTH - _LEFT - 30) * seconds / total

        step = max(30, round(total / 12 / 30) * 30)
        for tick in range(0, int(total) + 1, step):
            draw.line([(across(tick), _TOP), (across(tick), height - 40)], fill=_GRID)
            draw.text((across(tick), height - 34), f"{tick} s", fill=_TEXT, font=font, anchor="ma")
        for row, (name, times) in enumerate(self.bars.items()):
            y = _TOP + _ROW * row
            draw.text((16, y + 5), name, fill=_TEXT, font=font)
            draw.rectangle([across(times[0]), y + 4, across(times[-1]), y + _ROW - 8], fill=_BAR)
        labels = []
        for row, (seconds, event) in enumerate(self.marks):
            y = _TOP + _ROW * len(self.bars) + _EVENT * row + 10
            colour = _LOST if "lost" in event else _OTHER
            draw.line([(across(seconds), _TOP), (across(seconds), y + 8)], fill=colour, width=2)
            late = seconds > total * 0.75
            place, anchor = (across(seconds) + (-6 if late else 6), y), "ra" if late else "la"
            labels.append((place, f"{seconds:.0f} s: {event}", colour, anchor))
        for place, text, colour, anchor in labels:  # over all lines
            draw.rectangle(draw.textbbox(place, text, font=font, anchor=anchor), fill="white")
            draw.text(place, text, fill=colour, font=font, anchor=anchor)
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    def _now(self) -> float:
        return time.monotonic() - self.began
