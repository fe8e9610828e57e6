"""Small programs, as compilers write them."""

LOOP = """\
HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[8,4], f32[4,4])) -> (s32[], f32[8,4], f32[4,4]) {
  %p = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %w = f32[4,4]{1,0} get-tuple-element(%p), index=2
  %step = s32[] constant(2)
  %next = s32[] add(%i, %step)
  %y = f32[8,4]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %z = f32[8,4]{1,0} all-reduce(%y), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %t = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) tuple(%next, %z, %w)
}

%cond (q: (s32[], f32[8,4], f32[4,4])) -> pred[] {
  %q = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %end = s32[] constant(END)
  ROOT %less = pred[] compare(%j, %end), direction=LT
}

ENTRY %main (a: f32[8,4], b: f32[4,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  %zero = s32[] constant(START)
  %init = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) tuple(%zero, %a, %b)
  %loop = (s32[], f32[8,4]{1,0}, f32[4,4]{1,0}) while(%init), condition=%cond, body=%body
  ROOT %out = f32[8,4]{1,0} get-tuple-element(%loop), index=1
}
"""

CHOICE = """\
%yes (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%no (q: f32[8,8]) -> f32[8,8] {
  ROOT %q = f32[8,8]{1,0} parameter(0)
}

ENTRY %main (c: pred[], a: f32[8,8]) -> f32[8,8] {
  %c = pred[] parameter(0)
  %a = f32[8,8]{1,0} parameter(1)
  ROOT %r = f32[8,8]{1,0} conditional(%c, %a, %a), BRANCHES
}
"""
