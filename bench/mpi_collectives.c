// The other side of bench/collectives.ts: the same operations as a bare C loop over MPI, f32 sums. Compiled by the benchmark with
// mpicc. Prints one line per row: operation, bytes, microseconds (median of samples; a sample is the slowest rank's mean), and
// whether the data was right.

#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return x < y ? -1 : x > y;
}

static int rank, size, count;
static float *x, *y;
static int counts[64], offsets[64];

static void run(int op) {
  if (op == 0) MPI_Allreduce(x, y, count, MPI_FLOAT, MPI_SUM, MPI_COMM_WORLD);
  else if (op == 1) MPI_Alltoallv(x, counts, offsets, MPI_FLOAT, y, counts, offsets, MPI_FLOAT, MPI_COMM_WORLD);
  else MPI_Allgather(x, count / size, MPI_FLOAT, y, count / size, MPI_FLOAT, MPI_COMM_WORLD);
}

static float value(int r, int i) { return (float)((r + 1) * (i % 1000 + 1)); }

static int right(int op) {
  int block = count / size;
  for (int i = 0; i < count; i++) x[i] = value(rank, i), y[i] = -1;
  run(op);
  int good = 1;
  for (int i = 0; i < count && good; i++) {
    float want = op == 0   ? value(size * (size + 1) / 2 - 1, i)
                 : op == 1 ? value(i / block, rank * block + i % block)
                           : value(i / block, i % block);
    good = y[i] == want;
  }
  int all;
  MPI_Allreduce(&good, &all, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  return all;
}

// Arguments: samples, then "bytes:iterations" for each size.
int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  const char *names[] = {"allReduce", "allToAllV", "allGather"};
  int samples = atoi(argv[1]);
  double *times = malloc(samples * sizeof(double));
  size_t room = 64 << 20;
  if (posix_memalign((void **)&x, 64, room) || posix_memalign((void **)&y, 64, room)) return 1;
  memset(x, 0, room), memset(y, 0, room);
  for (int op = 0; op < 3; op++) {
    for (int a = 2; a < argc; a++) {
      long bytes;
      int iterations;
      sscanf(argv[a], "%ld:%d", &bytes, &iterations);
      count = bytes / 4;
      if (op != 0) count = count < size ? size : count / size * size;
      for (int r = 0; r < size; r++) counts[r] = count / size, offsets[r] = r * (count / size);
      int good = right(op);
      for (int i = 0; i < iterations; i++) run(op);
      for (int s = 0; s < samples; s++) {
        MPI_Barrier(MPI_COMM_WORLD);
        double start = MPI_Wtime();
        for (int i = 0; i < iterations; i++) run(op);
        double mine = (MPI_Wtime() - start) / iterations * 1e6;
        MPI_Allreduce(&mine, &times[s], 1, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
      }
      good = good && right(op);
      qsort(times, samples, sizeof(double), ascending);
      if (rank == 0) printf("%s %d %.4f %d\n", names[op], count * 4, times[samples / 2], good), fflush(stdout);
    }
  }
  MPI_Finalize();
  return 0;
}
