// Intel AMX: the tile instructions that the products use, or the same in plain C++.
//
// The second is for machines without them: with -DSLIPSTREAM_EMULATE_AMX everything around the
// instructions (layouts, tails, accumulation) is compiled and tested anywhere.
#pragma once

#include "simd.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && !defined(SLIPSTREAM_EMULATE_AMX)
#define SLIPSTREAM_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(SLIPSTREAM_EMULATE_AMX)
#define SLIPSTREAM_AMX 1
#else
#define SLIPSTREAM_AMX 0
#endif

namespace slipstream {
// Of a tile: its rows, the bytes and units of one, which are a cache line, and the units of a right
// operand's tile, which lies in one piece.
constexpr int TILE_HEIGHT = 16, TILE_BYTES = 64, LINE_UNITS = 16, TILE_UNITS = TILE_HEIGHT * LANES;

// So many rows, up to whole tiles: other heights are other shapes.
inline int whole_tiles(int rows) { return ceil_div(rows, TILE_HEIGHT) * TILE_HEIGHT; }
}  // namespace slipstream

#if SLIPSTREAM_AMX
namespace slipstream {

constexpr int TILES = 8;

// Whether what a tile is loaded from shall stay in the first-level cache for the next time, or makes
// room there for what does.
enum class Reuse { SOON, LATER };

// What ldtilecfg reads.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if defined(SLIPSTREAM_EMULATE_AMX)

inline thread_local TileShapes emulated_shapes;
inline thread_local uint32_t emulated[TILES][TILE_HEIGHT][TILE_BYTES / 4];

inline bool request_tiles() { return true; }
inline void shape_tiles(const TileShapes& shapes) { emulated_shapes = shapes; }
inline void release_tiles() {}
inline void fetch_lines(const char*, int) {}

template <int TILE>
void zero_tile() {
  std::memset(emulated[TILE], 0, sizeof emulated[TILE]);
}

template <int TILE, Reuse = Reuse::SOON>
void load_tile(const void* source, int64_t stride) {
  for (int r = 0; r < emulated_shapes.rows[TILE]; ++r)
    std::memcpy(emulated[TILE][r], static_cast<const char*>(source) + r * stride, TILE_BYTES);
}

template <int TILE>
void store_tile(void* target, int64_t stride) {
  for (int r = 0; r < emulated_shapes.rows[TILE]; ++r)
    std::memcpy(static_cast<char*>(target) + r * stride, emulated[TILE][r], TILE_BYTES);
}

template <class T, int SUM, int A, int B>
void multiply_tiles() {
  for (int r = 0; r < emulated_shapes.rows[SUM]; ++r)
    for (int u = 0; u < TILE_HEIGHT; ++u) {
      Int b = load_units(emulated[B][u]), x = splat_unit(emulated[A][r][u]);
      if constexpr (PER_UNIT<T> == 2) {
        const Vec sum = as_floats(load_units(emulated[SUM][r]));
        store(reinterpret_cast<float*>(emulated[SUM][r]), dot_add<T>(x, b, sum));
      } else {
        const Int sum = load_units(emulated[SUM][r]);
        write_lanes(emulated[SUM][r], dot_add_bytes(x, b, sum));
      }
    }
}

#else

// Linux gives a process the tile registers only when it asks (ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool request_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// Spelled out, because the compiler's own intrinsics take no template argument for a register, and
// GCC's ldtilecfg does not say that it reads all of its operand.
SLIPSTREAM_INLINE void shape_tiles(const TileShapes& shapes) {
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

SLIPSTREAM_INLINE void release_tiles() { asm volatile("tilerelease"); }

// Asks for `count` lines of 64 bytes to come into the second-level cache, at a pace: all at once would take
// every buffer that tiles are loaded through.
SLIPSTREAM_INLINE void fetch_lines(const char* from, int count) {
  asm volatile(
      ".balign 16\n"
      "0: prefetcht1 (%0)\n"
      "add $64, %0\n"
      "nop\n nop\n nop\n"
      "dec %1\n"
      "jnz 0b"
      : "+r"(from), "+r"(count)
      :
      : "cc");
}

template <int TILE>
SLIPSTREAM_INLINE void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE, Reuse REUSE = Reuse::SOON>
SLIPSTREAM_INLINE void load_tile(const void* source, int64_t stride) {
  if constexpr (REUSE == Reuse::SOON)
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(TILE) : "memory");
  else
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(stride), "i"(TILE)
                 : "memory");
}

template <int TILE>
SLIPSTREAM_INLINE void store_tile(void* target, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(stride), "i"(TILE) : "memory");
}

template <class T, int SUM, int A, int B>
SLIPSTREAM_INLINE void multiply_tiles() {
  if constexpr (PER_UNIT<T> == 2)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  else  // unsigned bytes of A times signed bytes of B
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
}

#endif

// This thread's tiles, as every kernel here uses them: 0-3 sums, 4-5 left operand, 6-7 right operand.
// Shaping costs as much as several products, so the shapes stay until others are wanted, or until
// the thread lets go: other libraries in the process use the tiles too.
class ThreadTiles {
 public:
  // For up to 32 rows: of more than sixteen, tiles 0, 1 and 4 have the first sixteen and 2, 3 and 5
  // the others; fewer are in each of them. Sixteen and 32 are one shape.
  void fit(int rows) {
    if (rows == TILE_HEIGHT) rows = 2 * TILE_HEIGHT;
    if (rows == rows_) return;
    const int lower = rows > TILE_HEIGHT ? rows - TILE_HEIGHT : rows;
    TileShapes shapes;
    for (int tile = 0; tile < TILES; ++tile) shapes.row_bytes[tile] = TILE_BYTES;
    shapes.rows[0] = shapes.rows[1] = shapes.rows[4] = std::min(rows, TILE_HEIGHT);
    shapes.rows[2] = shapes.rows[3] = shapes.rows[5] = lower;
    shapes.rows[6] = shapes.rows[7] = TILE_HEIGHT;
    shape_tiles(shapes);
    rows_ = rows;
  }

  void release() {
    if (rows_) release_tiles();
    rows_ = 0;
  }

 private:
  int rows_ = 0;
};

inline thread_local ThreadTiles thread_tiles;

inline bool tiles_granted() {
  static const bool granted = request_tiles();
  return granted;
}

SLIPSTREAM_INLINE void zero_sums() {
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
}

// Sums of 32 rows and columns, `stride` bytes from row to row.
SLIPSTREAM_INLINE void load_sums(const void* sums, int64_t stride, bool lower) {
  const char* row = static_cast<const char*>(sums);
  load_tile<0>(row, stride), load_tile<1>(row + TILE_BYTES, stride);
  if (!lower) return;
  row += TILE_HEIGHT * stride;
  load_tile<2>(row, stride), load_tile<3>(row + TILE_BYTES, stride);
}

SLIPSTREAM_INLINE void store_sums(void* sums, int64_t stride, bool lower) {
  char* row = static_cast<char*>(sums);
  store_tile<0>(row, stride), store_tile<1>(row + TILE_BYTES, stride);
  if (!lower) return;
  row += TILE_HEIGHT * stride;
  store_tile<2>(row, stride), store_tile<3>(row + TILE_BYTES, stride);
}

// A left operand's tiles: bytes from row to row, and units from one sixteen units of a row to the next.
struct LeftStrides {
  int64_t row_bytes, step;
};

// A right operand's tiles of sixteen columns: from one to the next sixteen units of the same columns, and
// to the next sixteen columns, in units.
struct RightStrides {
  int64_t down, across;
};

// Adds to the sums: rows times 32 columns; over `units` (a multiple of sixteen), with between() before each
// sixteen.
template <class T, Reuse ROWS = Reuse::SOON, class Between>
SLIPSTREAM_INLINE void multiply_units(const Unit* rows, LeftStrides left, bool lower,
                                      const Unit* columns, RightStrides right, int units,
                                      Between&& between) {
  const Unit* low = rows + TILE_HEIGHT * (left.row_bytes / sizeof(Unit));
  for (int u = 0; u < units; u += LINE_UNITS) {
    between();
    load_tile<6>(columns, TILE_BYTES);
    load_tile<4, ROWS>(rows, left.row_bytes);
    multiply_tiles<T, 0, 4, 6>();
    load_tile<7>(columns + right.across, TILE_BYTES);
    multiply_tiles<T, 1, 4, 7>();
    columns += right.down, rows += left.step;
    if (!lower) continue;
    load_tile<5, ROWS>(low, left.row_bytes);
    multiply_tiles<T, 2, 5, 6>();
    multiply_tiles<T, 3, 5, 7>();
    low += left.step;
  }
}

template <class T>
SLIPSTREAM_INLINE void multiply_units(const Unit* rows, LeftStrides left, bool lower,
                                      const Unit* columns, RightStrides right, int units) {
  multiply_units<T>(rows, left, lower, columns, right, units, [] {});
}

}  // namespace slipstream
#endif
