"""Will it fit? What a run needs of a device's memory, phase by phase and term by term, against what the device has."""

from dataclasses import dataclass

from qlite.errors import MachineError
from qlite.memory.ledger import Peak
from qlite.units import MIB, format_bytes

# What a CUDA context and the kernels that are loaded into it take beside torch's allocator. Measured on an H200: 764 to 830 MiB. A bare
# context is smaller on a consumer's card, by reports on the web 256 MiB (RTX 3090), 330 MiB (RTX 5090) and 426 MiB (RTX 6000 Ada).
CONTEXT_BYTES = 640 * MIB
# cuBLAS keeps a workspace for each of the two threads that compute, forward and backward: two of 32 MiB were measured on an H200, as on
# any card since Hopper; before, 8 MiB each. The rest is the last page of each of the two pools of torch's allocator.
SLACK_BYTES = 96 * MIB
# What lies unused between tensors: measured on an H200, at 5.1 GiB of tensors, 1.9 % (expandable segments). With the block constants in
# one place it was 2.5 to 5.4 % of what was allocated, and that 0 to 1.9 % less than planned: with ``SLACK_BYTES`` as much as is asked for.
GAPS_SHARE = 0.02
# A driver shows programs a little less than a card is sold with: 23.5 of 24 GiB, 31.4 of 32.
VISIBLE_SHARE = 0.98


@dataclass(frozen=True)
class MemoryPlan:
    """The peaks of a run's phases, as tensor bytes, and the device that they have to fit."""

    phases: dict[str, Peak]
    capacity: int | None
    """Bytes that the device, or the budget, allows; None: no device is named."""
    device: str
    """The device in words."""
    beside: int = 0
    """Bytes that the device must have whatever the tensors are: on a card CUDA's own and the allocator's, on a CPU none."""
    gaps: float = 0.0
    """Share of the tensors that lies unused between them: on a CPU none."""

    @classmethod
    def on_card(
        cls, phases: dict[str, Peak], capacity: int | None, device: str, beside: int = 0, has_context: bool = False
    ) -> "MemoryPlan":
        """Return the plan for a card, with all that it must have beside the tensors: ``beside``, and a context unless it is there."""
        return cls(phases, capacity, device, SLACK_BYTES + beside + (0 if has_context else CONTEXT_BYTES), GAPS_SHARE)

    def needed_for(self, peak: int) -> int:
        """Return the bytes that the device must have for tensors that take ``peak`` bytes."""
        return peak + int(self.gaps * peak) + self.beside

    def room_for(self, peak: int) -> bool:
        """Return whether the device has room for tensors that take ``peak`` bytes."""
        return self.capacity is None or self.needed_for(peak) <= self.capacity

    @property
    def phase(self) -> str:
        """The phase with the largest peak."""
        return max(self.phases, key=lambda phase: self.phases[phase].bytes)

    @property
    def peak(self) -> Peak:
        return self.phases[self.phase]

    @property
    def needed(self) -> int:
        """Bytes that the device must have."""
        return self.needed_for(self.peak.bytes)

    @property
    def outside(self) -> int:
        """Bytes of these that are no tensors."""
        return self.needed - self.peak.bytes

    @property
    def host(self) -> int:
        """Bytes of host memory for what is offloaded."""
        return max(peak.host for peak in self.phases.values())

    @property
    def headroom(self) -> int | None:
        """Bytes left over; negative: so many are missing."""
        return None if self.capacity is None else self.capacity - self.needed

    @property
    def fits(self) -> bool:
        return self.headroom is None or self.headroom >= 0

    def __str__(self) -> str:
        """Return the plan in one sentence."""
        told = f"{format_bytes(self.peak.bytes)} of tensors at most, in {self.phase}"
        if self.outside:
            told += f", and {format_bytes(self.outside)} beside them"
        if self.capacity is None:
            return f"{told}: {format_bytes(self.needed)}"
        verdict = f"{format_bytes(self.headroom)} to spare" if self.fits else f"{format_bytes(-self.headroom)} too much"
        return f"{told}: {verdict} on {self.device}"

    def require_fits(self, ways_out: list[str]) -> None:
        """Raise MachineError, with the ways out, if the device is too small."""
        if not self.fits:
            raise MachineError("\n".join([f"memory: {self}", *ways_out]))

    def as_record(self) -> dict:
        """Return the plan for a file, in bytes."""
        phases = {phase: peak.as_record() for phase, peak in self.phases.items()}
        return {"device": self.device, "capacity": self.capacity, "needed": self.needed, "outside": self.outside, "phases": phases}
