// out (M, N) = alpha a b + beta out, after Goto and van de Geijn: blocks of a and b are packed into panels that stay in cache,
// and a micro-kernel keeps a tile of out in registers while it runs down a panel. WebAssembly has 16 vector registers: a
// tile of 6 rows by 2 vectors takes 12, two hold the row of b, one the element of a.

#include "real.h"

#define MR 6
#define NR (2 * LANES)
#define MC 96  // rows of a packed block of a: MC KC reals (96 KiB of f32) stay in the L2 cache
#define KC 256
#define NC 512 // columns of a packed block of b

#ifdef REAL_F32
#define SPLAT(p) (vec)wasm_v128_load32_splat(p)
#else
#define SPLAT(p) (vec)wasm_v128_load64_splat(p)
#endif

// Reals of scratch that gemm needs.
EXPORT size_t NAME(gemm_scratch)(void) {
  return MC * KC + KC * NC;
}

// Packs `count` rows by `depth` columns of a matrix with strides into panels of `width` rows: within a panel, column after
// column. Rows that are missing in the last panel are 0. b is packed by the same code with its columns as rows.
INLINE void pack(
  const real *x, size_t row_stride, size_t column_stride, size_t count, size_t depth, size_t width, real *packed
) {
  for (size_t start = 0; start < count; start += width) {
    size_t here = count - start < width ? count - start : width;
    const real *panel = x + start * row_stride;
    if (here < width) for (size_t i = 0; i < width * depth; i++) packed[i] = 0;
    if (row_stride == 1) {
      for (size_t k = 0; k < depth; k++)
        for (size_t i = 0; i < here; i++) packed[k * width + i] = panel[k * column_stride + i];
    } else {
      for (size_t i = 0; i < here; i++)
        for (size_t k = 0; k < depth; k++) packed[k * width + i] = panel[i * row_stride + k * column_stride];
    }
    packed += width * depth;
  }
}

// tile (MR, NR) = panel of a (depth, MR) times panel of b (depth, NR)
INLINE void micro(const real *restrict a, const real *restrict b, size_t depth, vec tile[MR][2]) {
  vec c00 = { 0 }, c01 = { 0 }, c10 = { 0 }, c11 = { 0 }, c20 = { 0 }, c21 = { 0 };
  vec c30 = { 0 }, c31 = { 0 }, c40 = { 0 }, c41 = { 0 }, c50 = { 0 }, c51 = { 0 };
  for (size_t k = 0; k < depth; k++, a += MR, b += NR) {
    vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES), x;
    x = SPLAT(a + 0), c00 = MADD(x, b0, c00), c01 = MADD(x, b1, c01);
    x = SPLAT(a + 1), c10 = MADD(x, b0, c10), c11 = MADD(x, b1, c11);
    x = SPLAT(a + 2), c20 = MADD(x, b0, c20), c21 = MADD(x, b1, c21);
    x = SPLAT(a + 3), c30 = MADD(x, b0, c30), c31 = MADD(x, b1, c31);
    x = SPLAT(a + 4), c40 = MADD(x, b0, c40), c41 = MADD(x, b1, c41);
    x = SPLAT(a + 5), c50 = MADD(x, b0, c50), c51 = MADD(x, b1, c51);
  }
  tile[0][0] = c00, tile[0][1] = c01, tile[1][0] = c10, tile[1][1] = c11;
  tile[2][0] = c20, tile[2][1] = c21, tile[3][0] = c30, tile[3][1] = c31;
  tile[4][0] = c40, tile[4][1] = c41, tile[5][0] = c50, tile[5][1] = c51;
}

// out (rows, columns; stride ldo) = alpha tile + beta out, for a tile that may hang over the edge
INLINE void store_tile(
  const vec tile[MR][2], real *out, size_t ldo, size_t rows, size_t columns, real alpha, real beta
) {
  if (rows == MR && columns == NR) {
    for (size_t i = 0; i < MR; i++) {
      for (size_t j = 0; j < 2; j++) {
        vec *o = (vec *)(out + i * ldo + j * LANES);
        *o = beta == 0 ? alpha * tile[i][j] : alpha * tile[i][j] + beta * *o;
      }
    }
  } else {
    for (size_t i = 0; i < rows; i++) {
      for (size_t j = 0; j < columns; j++) {
        real *o = out + i * ldo + j, value = alpha * ((const real *)tile)[i * NR + j];
        *o = beta == 0 ? value : value + beta * *o;
      }
    }
  }
}

// a is read as a[m a_row + k a_column], b as b[k b_row + n b_column]: transposes are strides.
EXPORT void NAME(gemm)(
  size_t M, size_t N, size_t K, real alpha, const real *a, size_t a_row, size_t a_column,
  const real *b, size_t b_row, size_t b_column, real beta, real *out, size_t ldo, real *scratch
) {
  real *packed_a = scratch, *packed_b = scratch + MC * KC;
  if (K == 0) {
    for (size_t m = 0; m < M; m++)
      for (size_t n = 0; n < N; n++) out[m * ldo + n] = beta == 0 ? 0 : beta * out[m * ldo + n];
  }
  for (size_t n0 = 0; n0 < N; n0 += NC) {
    size_t columns = N - n0 < NC ? N - n0 : NC;
    for (size_t k0 = 0; k0 < K; k0 += KC) {
      size_t depth = K - k0 < KC ? K - k0 : KC;
      real keep = k0 == 0 ? beta : 1; // later blocks of K add to what the first has written
      pack(b + k0 * b_row + n0 * b_column, b_column, b_row, columns, depth, NR, packed_b);
      for (size_t m0 = 0; m0 < M; m0 += MC) {
        size_t rows = M - m0 < MC ? M - m0 : MC;
        pack(a + m0 * a_row + k0 * a_column, a_row, a_column, rows, depth, MR, packed_a);
        for (size_t n = 0; n < columns; n += NR) {
          for (size_t m = 0; m < rows; m += MR) {
            vec tile[MR][2];
            micro(packed_a + m * depth, packed_b + n * depth, depth, tile);
            store_tile(
              tile, out + (m0 + m) * ldo + n0 + n, ldo, rows - m < MR ? rows - m : MR,
              columns - n < NR ? columns - n : NR, alpha, keep
            );
          }
        }
      }
    }
  }
}
