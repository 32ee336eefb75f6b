// The activations' formulas, for elementwise.cu and grouped_fused.cu: both give the same bits, so an activation that is computed again is the
// one that was. A gradient gives the activation, too, which shares its exponential. It comes
// behind common.cuh.

constexpr float LOG2E = 1.4426950408889634f;

#ifndef LINA_EMULATE
DEVICE float reciprocal_fast(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// x between −100 and 100; NaN stays.
DEVICE float within_100(float x) {
  asm("{ .reg .f32 low; max.NaN.f32 low, %0, 0fC2C80000; min.NaN.f32 %0, low, 0f42C80000; }" : "+f"(x));
  return x;
}
#else
DEVICE float reciprocal_fast(float x) { return 1.0f / x; }
DEVICE float within_100(float x) { return x < -100.0f ? -100.0f : x > 100.0f ? 100.0f : x; }
#endif

// 1 / (1 + 2^x): 0 where 2^x is infinite.
DEVICE float sigmoid_of_power(float x) { return reciprocal_fast(1.0f + exp2_fast(x)); }

// gelu(x) = x · s with s = sigmoid(2u), u = √(2/π) (x + 0.044715 x³), since (1 + tanh u) / 2 = sigmoid(2u); s = 1 / (1 + 2^(x (A + B x²))).
struct Gelu {
  static constexpr float SCALE = 1.5957691216057308f, CUBE = 0.044715f, A = -SCALE * LOG2E, B = A * CUBE;
  static DEVICE float value(float x) { return x * sigmoid_of_power(x * fmaf(B, x * x, A)); }
  static DEVICE float gradient(float d, float x, float& active) {
    float near = within_100(x);  // the slope is 0 or 1 beyond, the powers finite within
    float square = near * near, s = sigmoid_of_power(near * fmaf(B, square, A));
    float slope = near * fmaf(3.0f * SCALE * CUBE, square, SCALE);
    active = x * s;
    return d * fmaf(slope, fmaf(-s, s, s), s);
  }
  static DEVICE float gradient(float d, float x) {
    float active;
    return gradient(d, x, active);
  }
};
struct Relu {
  static DEVICE float value(float x) { return x < 0.0f ? 0.0f : x; }
  static DEVICE float gradient(float d, float x, float& active) {
    active = value(x);
    return x > 0.0f ? d : 0.0f;
  }
  static DEVICE float gradient(float d, float x) {
    float active;
    return gradient(d, x, active);
  }
};

// silu(gate) · up. With s = sigmoid(gate): dGate = d · up · s (1 + gate (1 − s)), dUp = d · gate · s.
struct Swiglu {
  static DEVICE float value(float gate, float up) { return gate * sigmoid_of_power(-LOG2E * gate) * up; }
  static DEVICE void gradient(float d, float gate, float up, float& d_gate, float& d_up, float& active) {
    float s = sigmoid_of_power(-LOG2E * gate), silu = gate * s;
    active = silu * up;
    d_gate = d * up * fmaf(silu, 1.0f - s, s);
    d_up = d * silu;
  }
  static DEVICE void gradient(float d, float gate, float up, float& d_gate, float& d_up) {
    float active;
    gradient(d, gate, up, d_gate, d_up, active);
  }
};
