// Quantizes rows that are there as floats.
//
// Grid: (256 columns, rows of all panels). Block: 256 threads.
#include "quantize.h"

KERNEL(256) quantize_rows(const float *x, QuantizedRows to) {
    __shared__ quantize::Memory memory;
    const u32 row = block_y();
    quantize::column(memory, to, row, block_x() * 256 + thread(), [&](u32 i) { return x[u64(row) * to.cols + i]; });
}
