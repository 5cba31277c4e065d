"""What a compiled program moves: the HLO that TPUs' compiler writes, in short, and a program compiled here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlin.config import MeshConfig
from jaxlin.kernels.hlo_program import Program, group_size
from jaxlin.sharding import make_mesh

# A loop over 24 layers whose counter advances by 2 in a fusion. A gather that runs beside two fusions is one; arrays in
# S(1) are in VMEM.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=16

%advance (param_0.1: s32[]) -> s32[] {
  %param_0.1 = s32[]{:T(128)} parameter(0)
  %constant.1 = s32[]{:T(128)} constant(2)
  ROOT %add.1 = s32[]{:T(128)} add(%param_0.1, %constant.1)
}

%sliced (param_0.2: f32[24,8,128], param_1.2: s32[]) -> f32[1,8,128] {
  %param_0.2 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.2 = s32[]{:T(128)} parameter(1)
  %constant.2 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[1,8,128]{2,1,0:T(8,128)S(1)} dynamic-slice(%param_0.2, %param_1.2, %constant.2, %constant.2)
}

%gathering (param_0.3: f32[1,8,128]) -> (f32[1,8,128], f32[1,8,2048]) {
  %param_0.3 = f32[1,8,128]{2,1,0:T(8,128)S(1)} parameter(0)
  %all-gather.1 = f32[1,8,2048]{2,1,0:T(8,128)} all-gather(%param_0.3), channel_id=7, replica_groups=[1,16]<=[16]
  ROOT %tuple.1 = (f32[1,8,128]{2,1,0:T(8,128)S(1)}, f32[1,8,2048]{2,1,0:T(8,128)}) tuple(%param_0.3, %all-gather.1)
}

%gathering.2 (param_0.4: f32[1,8,128]) -> (f32[1,8,128], f32[1,8,2048]) {
  %param_0.4 = f32[1,8,128]{2,1,0:T(8,128)S(1)} parameter(0)
  %all-gather.2 = f32[1,8,2048]{2,1,0:T(8,128)} all-gather(%param_0.4), channel_id=7, replica_groups=[1,16]<=[16]
  ROOT %tuple.2 = (f32[1,8,128]{2,1,0:T(8,128)S(1)}, f32[1,8,2048]{2,1,0:T(8,128)S(1)}) tuple(%param_0.4, %all-gather.2)
}

%more (p.1: (s32[], f32[24,8,128])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %constant.3 = s32[]{:T(128)} constant(24)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.3), direction=LT
}

%layer (p.2: (s32[], f32[24,8,128])) -> (s32[], f32[24,8,128]) {
  %p.2 = (s32[]{:T(128)}, f32[24,8,128]{2,1,0:T(8,128)}) parameter(0)
  %get-tuple-element.2 = s32[]{:T(128)} get-tuple-element(%p.2), index=0
  %get-tuple-element.3 = f32[24,8,128]{2,1,0:T(8,128)} get-tuple-element(%p.2), index=1
  %fusion.1 = f32[1,8,128]{2,1,0:T(8,128)S(1)} fusion(%get-tuple-element.3, %get-tuple-element.2), kind=kLoop, calls=%sliced
  %fusion.2 = (f32[1,8,128]{2,1,0:T(8,128)S(1)}, f32[1,8,2048]{2,1,0:T(8,128)S(1)}) fusion(%fusion.1), kind=kCustom, calls=%gathering
  %fusion.3 = (f32[1,8,128]{2,1,0:T(8,128)S(1)}, f32[1,8,2048]{2,1,0:T(8,128)S(1)}) fusion(%fusion.1), kind=kCustom, calls=%gathering.2
  %kernel_forward.1 = f32[8,128]{1,0:T(8,128)} custom-call(%fusion.1), custom_call_target="tpu_custom_call"
  %fusion.4 = s32[]{:T(128)} fusion(%get-tuple-element.2), kind=kLoop, calls=%advance
  ROOT %tuple.3 = (s32[]{:T(128)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%fusion.4, %get-tuple-element.3)
}

ENTRY %main (w.1: f32[24,8,128]) -> f32[24,8,128] {
  %w.1 = f32[24,8,128]{2,1,0:T(8,128)} parameter(0)
  %constant.4 = s32[]{:T(128)} constant(0)
  %tuple.4 = (s32[]{:T(128)}, f32[24,8,128]{2,1,0:T(8,128)}) tuple(%constant.4, %w.1)
  %while.1 = (s32[]{:T(128)}, f32[24,8,128]{2,1,0:T(8,128)}) while(%tuple.4), condition=%more, body=%layer, metadata={}
  ROOT %get-tuple-element.4 = f32[24,8,128]{2,1,0:T(8,128)} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501
SLICE, LAYERS = 4 * 8 * 128, 12


def test_loops_and_collectives():
    program = Program(TPU)
    assert program.runs["%layer"] == LAYERS == program.runs["%gathering"]
    assert program.collectives().keys() == {"all-gather"}
    assert program.collectives()["all-gather"] == (LAYERS, LAYERS * 15 * SLICE)


def test_hbm():
    """The slice alone is read; a Pallas call moves what is known of it, or its operands and result."""
    counter, gathered = 2 * 4 + 4, 16 * SLICE  # of the two fusions that read the counter, one writes it
    test = 4 + 4 + 1  # the condition's compare
    once = SLICE + gathered + counter + test
    assert Program(TPU).hbm_bytes({"kernel_forward": 1e6}) == LAYERS * (once + 1e6)
    assert Program(TPU).hbm_bytes({}) == LAYERS * (once + SLICE)


def test_fusions_beside_others():
    """As XLA for GPUs copies what a loop keeps, while it goes on: the layer's slice alone is written."""
    program = Program(
        """
%copied (p0: f32[24,128], p1: s32[], p2: f32[128]) -> f32[24,128] {
  %p0 = f32[24,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[128]{0} parameter(2)
  %row = f32[1,128]{1,0} bitcast(%p2)
  ROOT %update = f32[24,128]{1,0} dynamic-update-slice(%p0, %row, %p1, %p1)
}

ENTRY %main (all: f32[24,128], n: s32[], one: f32[128]) -> f32[24,128] {
  %all = f32[24,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %one = f32[128]{0} parameter(2)
  %start = ((f32[24,128]{1,0}, s32[], f32[128]{0}), f32[24,128]{1,0}, u32[]) fusion-start(%all, %n, %one), kind=kLoop, calls=%copied
  ROOT %done = f32[24,128]{1,0} fusion-done(%start)
}
"""  # noqa: E501
    )
    assert program.hbm_bytes({}) == 2 * 4 * 128 + 4


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups=[2,8]<=[2,8]T(1,0), ", 8),
        ("replica_groups={{0,1,2},{3,4,5}}, ", 3),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, ", 4),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=8] {'axis_0','axis_1':(2)4}, ", 8),
        ("", 16),
    ],
)
def test_groups(groups, size):
    assert group_size(groups, 16) == size


def test_a_program_compiled_here():
    """Five layers on a mesh of 8: each gathers its weight and adds up over devices in every turn of the loop."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    row, rows = NamedSharding(mesh, PartitionSpec(None, "fsdp")), NamedSharding(mesh, PartitionSpec("fsdp"))
    weights = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=row)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)

    def layers(weights, x):
        def layer(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(jnp.tanh(x @ whole), rows), None

        return jax.lax.scan(layer, x, weights)[0]

    program = Program(jax.jit(layers).lower(weights, x).compile().as_text())
    gathered = program.collectives()["all-gather"]
    assert program.devices == 8
    assert gathered == (5, 5 * 64 * 64 * 4 * 7 / 8)
    floor = 5 * 64 * 64 * 4  # a weight once, at least
    assert floor < program.hbm_bytes({}) < 20 * floor
