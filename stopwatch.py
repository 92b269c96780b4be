"""Where an update's time goes: a stopwatch pressed where one part of the model ends, in the forward and the backward.

    watch = Stopwatch(cuda=False)
    seconds = watch.time(update, model)     # one update with marks around the parts -> {part: seconds}

The optimizer is not part of the model: update() calls watch.lap('rest') before it and watch.lap('optimizer') after it.
bench.py --task=parts is built on this.
"""
import contextlib
import time

import torch

import moe

PARTS = ('attention', 'router', 'dispatch', 'experts', 'head', 'optimizer', 'rest')


class Stopwatch:
    def __init__(self, cuda):
        self.cuda, self.laps = cuda, []                         # (part that ended, when)

    def lap(self, part):
        """`part` has just ended. On a GPU an event, so that nothing waits for the device."""
        if self.cuda:
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self.laps.append((part, stamp if self.cuda else time.perf_counter()))

    def time(self, update, model):
        """One update() of the model, with marks -> {part: seconds}; a part without any is 0."""
        synchronize = torch.cuda.synchronize if self.cuda else lambda: None
        self.laps.clear()
        synchronize()
        self.lap('start')
        with self.marked(model):
            update()
        synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, start), (part, end) in zip(self.laps, self.laps[1:]):
            seconds[part] += start.elapsed_time(end) / 1e3 if self.cuda else end - start
        return seconds

    @contextlib.contextmanager
    def marked(self, model):
        """Marks around the parts of a model, as long as the with block lasts."""
        def mark(before, after, *tensors):
            return Mark.apply(self.lap, before, after, *tensors)

        def around(part, outside, work, tensors=1):             # its first so many arguments carry gradients over
            def wrapped(*rest, **named):
                y = work(*mark(outside, part, *rest[:tensors]), *rest[tensors:], **named)
                if torch.is_tensor(y):
                    return mark(part, outside, y)[0]
                if part == 'router':                            # chosen, weights, Routing
                    weights, balance, z = mark(part, outside, y[1], y[2].balance_loss, y[2].z_loss)
                    return y[0], weights, y[2]._replace(balance_loss=balance, z_loss=z)
                first = mark(part, outside, y[0])[0]            # of the head's Output, or of the layer's (y, Routing)
                return y._replace(nll=first) if part == 'head' else (first, *y[1:])
            return wrapped

        def inside(part, outside, work):                        # within a function that has its backward by hand
            def wrapped(*tensors):
                self.lap(outside)
                y = work(*tensors)
                self.lap(part)
                return y
            return wrapped

        plain = {name: getattr(moe, name) for name in ('grouped_swiglu', 'gather_rows', 'add_rows')}
        moe.grouped_swiglu = around('experts', 'dispatch', moe.grouped_swiglu, 2)
        moe.SegmentedSwiGLU.apply = around('experts', 'dispatch', moe.SegmentedSwiGLU.apply, 2)
        moe.gather_rows, moe.add_rows = (inside('dispatch', 'experts', work) for work in (moe.gather_rows, moe.add_rows))
        model.head_loss = around('head', 'rest', model.head_loss)
        for layer in model.layers:
            layer.attn.forward = around('attention', 'rest', layer.attn.forward)
            layer.moe.forward = around('dispatch', 'rest', layer.moe.forward)
            layer.moe.route = around('router', 'dispatch', layer.moe.route)
        try:
            yield
        finally:
            vars(moe).update(plain)
            del moe.SegmentedSwiGLU.apply, model.head_loss      # those of the class are back
            for layer in model.layers:
                del layer.attn.forward, layer.moe.forward, layer.moe.route


class Mark(torch.autograd.Function):
    """The identity, on the border of two parts: ends the one before in the forward, the one after in the backward.

    Autograd runs backward what was recorded in the forward, latest first, so that every moment between two marks
    belongs to one part. A border that several tensors cross is one Mark of them all; it waits for all their gradients.
    """

    @staticmethod
    def forward(ctx, lap, before, after, *tensors):
        ctx.lap, ctx.after = lap, after
        lap(before)
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        ctx.lap(ctx.after)
        return None, None, None, *grads
