// The least that native code needs: if this cannot be compiled, kept or loaded, nothing can.

#include <omp.h>

extern "C" int threads() {
    int count = 0;
#pragma omp parallel reduction(+ : count)
    count += 1;
    return count;
}
