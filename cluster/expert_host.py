"""One device's expert host: a plain class that answers frames, whatever carries them.

::

    dispatch frame ──► check plan, rows, experts ──► ExpertStore ──► rows, or weighted sums ──► combine frame

A host follows a plan, named by its epoch. While a new plan is being prepared it follows both; frames of any other are
refused, so that a sender that missed a change cannot be answered by experts that have moved.
"""

import torch

from cluster.expert_store import ExpertStore
from cluster.partial_sums import sum_pairs, to_format
from cluster.transport.codec import Buffer, decode, encode
from cluster.transport.frames import HEADER_BYTES, CombineFrame, DispatchFrame, ProbeFrame
from cluster.transport.header import FrameLimits
from cluster.transport.row_format import row_bytes
from moe_bitnet.errors import ClusterError, FrameError, StalePlanError
from moe_bitnet.experts import ExpertInput

_WORK_FRAMES = 8  # outputs are float32 before they are summed: 8 experts a row, all on one host, for a full frame


class ExpertHost:
    """Runs the experts of a store on rows that arrive.

    Args:
        store: the experts of this device.
        epoch: number of the plan that this host follows.

    Attributes:
        store: the experts of this device.
        epoch: the newest plan that this host was told to follow.
        limits: of frames.
    """

    def __init__(self, store: ExpertStore, epoch: int = 0) -> None:
        self.store = store
        self.epoch = epoch
        self._epochs = frozenset((epoch,))
        self.limits = FrameLimits()

    def follow(self, epoch: int) -> None:
        """Follow one more plan; its experts must be loaded."""
        self._epochs |= {epoch}
        self.epoch = max(self.epoch, epoch)

    def leave_before(self, epoch: int) -> None:
        """Refuse the frames of all plans before ``epoch``."""
        self._epochs = frozenset(each for each in self._epochs if each >= epoch)

    @torch.inference_mode()
    def answer(self, buffer: Buffer) -> bytes:
        """Run one frame and return the answer to it.

        Raises:
            FrameError: the bytes are no frame that a host takes.
            StalePlanError: the frame follows another plan.
            ClusterError: it asks for an expert that is not here, or its rows are none that the experts take.
        """
        received = decode(buffer, self.limits)
        frame = received.frame
        if isinstance(frame, ProbeFrame):
            return encode(ProbeFrame(self.epoch), received.request_id)
        if not isinstance(frame, DispatchFrame):
            raise FrameError("frame refused: a host takes dispatch and probe frames alone. The sender is at fault.")
        self._check_plan(frame)
        self._check_size(frame)
        try:
            return encode(self._run(frame), received.request_id)
        except ClusterError:
            self._check_plan(frame)  # if the plan was left meanwhile, its experts may have gone with it
            raise

    def _check_plan(self, frame: DispatchFrame) -> None:
        if frame.epoch not in self._epochs:
            raise StalePlanError(
                f"host {self.store.device_name!r} follows plan {self.epoch}, the frame follows plan {frame.epoch}. "
                f"Send it again by the current plan."
            )

    def _check_size(self, frame: DispatchFrame) -> None:
        """Refuse what takes more memory than frames may have: a few bytes can ask for 255 experts for each row."""
        hidden_size, num_pairs = frame.rows.shape[1], len(frame.expert_ids)
        answer_bytes = HEADER_BYTES + frame.num_answer_rows * row_bytes(hidden_size, frame.combine.row_format)
        work_bytes = num_pairs * row_bytes(hidden_size, "float32")
        if answer_bytes > self.limits.max_frame_bytes or work_bytes > _WORK_FRAMES * self.limits.max_frame_bytes:
            raise ClusterError(
                f"host {self.store.device_name!r}: {num_pairs} outputs of {hidden_size} values need {work_bytes} bytes "
                f"of work and {answer_bytes} of answer; frames have at most {self.limits.max_frame_bytes}, work "
                f"{_WORK_FRAMES} times as much. Run fewer tokens at once."
            )

    def _run(self, frame: DispatchFrame) -> CombineFrame:
        rows = self._prepare(frame)
        outputs = self.store.compute(frame.layer_index, rows, frame.pairs_per_row, frame.expert_ids)
        if frame.expert_weights is not None:
            outputs = sum_pairs(outputs, frame.expert_weights, frame.pairs_per_row)
        values, scales = to_format(outputs, frame.combine.row_format)
        return CombineFrame(frame.layer_index, frame.epoch, values, scales)

    def _prepare(self, frame: DispatchFrame) -> ExpertInput:
        """Return the frame's rows as the experts take them; float rows for ternary experts are quantized here."""
        name, config = self.store.device_name, self.store.config
        if frame.rows.shape[1] != config.hidden_size:
            raise ClusterError(
                f"host {name!r} serves a model with hidden_size {config.hidden_size}, the frame has rows of "
                f"{frame.rows.shape[1]}. The sender runs another model."
            )
        if frame.scales is None:
            return self.store.prepare(frame.rows.float())
        if not config.is_packable:
            raise ClusterError(
                f"host {name!r} holds float experts, which take no int8 rows. Dispatch in float16 or float32."
            )
        return ExpertInput(frame.rows, frame.scales)
