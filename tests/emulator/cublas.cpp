// libcublas for the CPU emulator: cublasGemmEx for f32, f64 and bf16 with f32 (f64) sums, column-major. Operands are unpacked to f32 (f64)
// and multiplied by plain loops that clang vectorises; no claim to speed.

#include "emulator.h"

#include <cstring>
#include <vector>

using lina::sticky;

namespace {

enum Type { F32 = 0, F64 = 1, BF16 = 14 };
enum { NOT_INITIALIZED = 1, INVALID = 7, NOT_SUPPORTED = 15, EXECUTION_FAILED = 13 };

struct Handle {
  int mode = 0;
  void* stream = nullptr;
};

float from_bf16(uint16_t bits) {
  uint32_t all = uint32_t(bits) << 16;
  float out;
  memcpy(&out, &all, 4);
  return out;
}
uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename S>
S load(const void* at, int type, size_t i) {
  if (type == BF16) return S(from_bf16(static_cast<const uint16_t*>(at)[i]));
  if (type == F32) return S(static_cast<const float*>(at)[i]);
  return S(static_cast<const double*>(at)[i]);
}
template <typename S>
void store(void* at, int type, size_t i, S x) {
  if (type == BF16) {
    static_cast<uint16_t*>(at)[i] = to_bf16(float(x));
  } else if (type == F32) {
    static_cast<float*>(at)[i] = float(x);
  } else {
    static_cast<double*>(at)[i] = double(x);
  }
}

// C[:, j] = alpha sum_l A[:, l] B[l, j] + beta C[:, j]; `a` becomes m x k column-major, `b` k x n.
template <typename S>
void multiply(bool ta, bool tb, int m, int n, int k, S alpha, const void* a, int type_a, int lda, const void* b, int type_b, int ldb, S beta, void* c, int type_c,
              int ldc) {
  std::vector<S> packed(size_t(m) * size_t(k)), column(static_cast<size_t>(m));
  if (ta) {
    for (int i = 0; i < m; i++) {
      for (int l = 0; l < k; l++) packed[size_t(l) * m + i] = load<S>(a, type_a, size_t(i) * lda + l);
    }
  } else {
    for (int l = 0; l < k; l++) {
      for (int i = 0; i < m; i++) packed[size_t(l) * m + i] = load<S>(a, type_a, size_t(l) * lda + i);
    }
  }
  for (int j = 0; j < n; j++) {
    S* sum = column.data();
    for (int i = 0; i < m; i++) sum[i] = 0;
    for (int l = 0; l < k; l++) {
      S factor = load<S>(b, type_b, tb ? size_t(l) * ldb + j : size_t(j) * ldb + l);
      const S* from = packed.data() + size_t(l) * m;
      for (int i = 0; i < m; i++) sum[i] += from[i] * factor;
    }
    for (int i = 0; i < m; i++) {
      size_t at = size_t(j) * ldc + i;
      S x = alpha * sum[i];
      if (beta != 0) x += beta * load<S>(c, type_c, at);
      store<S>(c, type_c, at, x);
    }
  }
}

}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
  *handle = new Handle;
  return 0;
}
EXPORT int cublasDestroy_v2(void* handle) {
  delete static_cast<Handle*>(handle);
  return 0;
}
EXPORT int cublasSetStream_v2(void* handle, void* stream) {
  if (!handle) return NOT_INITIALIZED;
  static_cast<Handle*>(handle)->stream = stream;
  return 0;
}
EXPORT int cublasSetWorkspace_v2(void* handle, void*, size_t) { return handle ? 0 : NOT_INITIALIZED; }
EXPORT int cublasSetMathMode(void* handle, int mode) {
  if (!handle) return NOT_INITIALIZED;
  static_cast<Handle*>(handle)->mode = mode;
  return 0;
}
EXPORT int cublasGetVersion_v2(void*, int* version) {
  *version = 130000;
  return 0;
}
EXPORT int cublasGemmEx(void* handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                        const void* beta, void* c, int type_c, int ldc, int compute, int) {
  if (!handle) return NOT_INITIALIZED;
  if (sticky()) return EXECUTION_FAILED;
  int least_a = ta ? k : m, least_b = tb ? n : k;
  if (ta < 0 || ta > 2 || tb < 0 || tb > 2 || m < 0 || n < 0 || k < 0 || lda < (least_a > 1 ? least_a : 1) || ldb < (least_b > 1 ? least_b : 1) || ldc < (m > 1 ? m : 1)) {
    return INVALID;
  }
  bool pair = type_a == type_b && ((type_a == BF16 && (type_c == BF16 || type_c == F32)) || (type_a == F32 && type_c == F32) || (type_a == F64 && type_c == F64));
  if (!pair) return NOT_SUPPORTED;
  if (m == 0 || n == 0) return 0;
  void* stream = static_cast<Handle*>(handle)->stream;
  // The factors are read now, the matrices when the stream comes to it.
  if (type_a == F64) {
    if (compute != 70 && compute != 71) return NOT_SUPPORTED;
    double x = *static_cast<const double*>(alpha), y = *static_cast<const double*>(beta);
    lina::enqueue(stream, [=] { multiply<double>(ta, tb, m, n, k, x, a, type_a, lda, b, type_b, ldb, y, c, type_c, ldc); });
  } else {
    if (compute != 68 && compute != 69 && compute != 77) return NOT_SUPPORTED;
    float x = *static_cast<const float*>(alpha), y = *static_cast<const float*>(beta);
    lina::enqueue(stream, [=] { multiply<float>(ta, tb, m, n, k, x, a, type_a, lda, b, type_b, ldb, y, c, type_c, ldc); });
  }
  return 0;
}
EXPORT const char* cublasGetStatusString(int status) {
  switch (status) {
    case 0: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case INVALID: return "CUBLAS_STATUS_INVALID_VALUE";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    default: return "an unknown status";
  }
}
