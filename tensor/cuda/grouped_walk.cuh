// How a block of a persistent kernel finds its tiles of a grouped matrix product from the groups' offsets on the device: what grouped.cu and
// grouped_hopper.cu share. It comes behind common.cuh.
//
// MODE 0: out[r] = w[g] x[r]     x [R, K], w[g] [N, K]
// MODE 1: out[r] = w[g]ᵀ x[r]    x [R, K], w[g] [K, N]
// MODE 2: out[g] = dy_gᵀ x_g     dy [R, M], x [R, N], summed over the rows of group g

// Tiles in m that share tiles in n while those are in the L2 cache.
constexpr int BAND = 16;

// Where a tile of the product lies. A unit of work is one tile, or those of a cluster's blocks, next to each other in m.
struct Tile {
  int group, first_row, rows;  // the group and its rows
  int m, n;                    // in units and tiles
};

// The units of all groups, numbered group by group; a block asks for ascending numbers.
template <int MODE, int UNIT_M, int TILE_N>
struct Walk {
  const int* offsets;
  const u16* order;  // the groups in the order of their units, or null for their own
  int groups, m_size, n_units;
  int place, group, before, first_row, rows, m_units;

  DEVICE Walk(const int* offsets, const u16* order, int groups, int m_size, int n_size)
      : offsets(offsets), order(order), groups(groups), m_size(m_size), n_units((n_size + TILE_N - 1) / TILE_N), place(0),
        before(0) {
    enter();
  }
  DEVICE void enter() {
    group = order ? order[place] : place;
    first_row = offsets[group];
    rows = offsets[group + 1] - first_row;
    m_units = ((MODE == 2 ? m_size : rows) + UNIT_M - 1) / UNIT_M;
  }
  // False when there is no such unit.
  DEVICE bool find(int unit, Tile& tile) {
    while (unit >= before + m_units * n_units) {
      before += m_units * n_units;
      if (++place >= groups) return false;
      enter();
    }
    int i = unit - before, band = i / (BAND * n_units), height = min(BAND, m_units - band * BAND);
    i -= band * BAND * n_units;
    tile.group = group;
    tile.first_row = first_row;
    tile.rows = rows;
    tile.m = band * BAND + i % height;
    tile.n = i / height;
    return true;
  }
};
