// An f32 number as the sum of bf16 numbers, 8 bits of its 24 each, so that tensor cores can multiply it. Before gate.cu, gate_combine.cu and gate_hopper.cu.

// Two floats as three pairs of bf16, whose sums they are.
DEVICE void split3(float low, float high, u32 out[3]) {
#pragma unroll
  for (int i = 0; i < 3; i++) {
    out[i] = pack_bf16(low, high);
    low -= __uint_as_float(out[i] << 16);
    high -= __uint_as_float(out[i] & 0xffff0000u);
  }
}
// The first two of them: 16 bits.
DEVICE void split2(float low, float high, u32 out[2]) {
#pragma unroll
  for (int i = 0; i < 2; i++) {
    out[i] = pack_bf16(low, high);
    low -= __uint_as_float(out[i] << 16);
    high -= __uint_as_float(out[i] & 0xffff0000u);
  }
}

