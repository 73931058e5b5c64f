/* A libcuda.so.1 without a GPU, for tests: it answers as a driver with one device would, copies memory on the host, and
   records launches instead of running them.

   A real driver knows from the machine code how many arguments a kernel has and how long each is. So does this one: it
   reads the parameter table of the loaded cubin, and copies at each launch what the pointers of the caller point to. */

#include <elf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500 };
enum { MOST_PARAMETERS = 192, MOST_LAUNCHES = 4096, MOST_LIBRARIES = 1024 };

typedef int Result;

typedef struct {
    char name[1024];
    int count; /* of parameters */
    uint32_t bytes[MOST_PARAMETERS];
} Kernel;

typedef struct {
    const char *name;
    uint32_t shape[6]; /* grid, then block */
    uint32_t shared_bytes;
    uint32_t count;
    void *stream;
    uint32_t bytes[MOST_PARAMETERS];
    uint64_t values[MOST_PARAMETERS];
} Launch;

static const void *libraries[MOST_LIBRARIES];
static Launch launches[MOST_LAUNCHES];
static int library_count, launch_count, launch_result;
static void *current_context;
static void *const CONTEXT = (void *)0x1000;

/* What the tests ask ------------------------------------------------------------------------------------------------ */

int stub_launches(const Launch **found) { *found = launches; return launch_count; }
void stub_forget(void) { launch_count = 0; }
int stub_libraries(void) { return library_count; }
void stub_refuse(int result) { launch_result = result; }

/* Device and context ------------------------------------------------------------------------------------------------ */

static Result cuDriverGetVersion(int *version) {
    const char *asked = getenv("STUB_DRIVER_VERSION");
    *version = asked ? atoi(asked) : 13000;
    return SUCCESS;
}

static Result cuDeviceGetCount(int *count) { *count = 1; return SUCCESS; }
static Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
static Result cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Stub"); return SUCCESS; }
static Result cuDeviceGetUuid_v2(void *uuid, int device) { memset(uuid, 1, 16); return SUCCESS; }
static Result cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 1ull << 36; return SUCCESS; }

static Result cuDeviceGetAttribute(int *value, int attribute, int device) {
    switch (attribute) {
    case 1: *value = 1024; break;  /* threads per block */
    case 10: *value = 32; break;   /* warp */
    case 16: *value = 132; break;  /* multiprocessors */
    case 75: *value = 9; break;    /* compute capability 9.0 */
    case 76: *value = 0; break;
    default: *value = 1;
    }
    return SUCCESS;
}

static Result cuDevicePrimaryCtxRetain(void **context, int device) { *context = CONTEXT; return SUCCESS; }
static Result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return SUCCESS;
}
static Result cuCtxGetCurrent(void **context) { *context = current_context; return SUCCESS; }
static Result cuCtxSetCurrent(void *context) { current_context = context; return SUCCESS; }
static Result cuCtxPushCurrent_v2(void *context) { current_context = context; return SUCCESS; }
static Result cuCtxPopCurrent_v2(void **context) {
    *context = current_context;
    current_context = NULL;
    return SUCCESS;
}
static Result cuCtxGetDevice(int *device) { *device = 0; return current_context ? SUCCESS : INVALID_CONTEXT; }
static Result cuStreamGetCtx(void *stream, void **context) { *context = CONTEXT; return SUCCESS; }

/* Memory is the host's ---------------------------------------------------------------------------------------------- */

static Result cuMemAlloc_v2(void **memory, size_t bytes) {
    *memory = malloc(bytes);
    return *memory ? SUCCESS : OUT_OF_MEMORY;
}
static Result cuMemFree_v2(void *memory) { free(memory); return SUCCESS; }
static Result cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { *free_bytes = *total = 1ull << 36; return SUCCESS; }
static Result copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); return SUCCESS; }
static Result copy_async(void *to, const void *from, size_t bytes, void *stream) { return copy(to, from, bytes); }

/* Code -------------------------------------------------------------------------------------------------------------- */

/* The sizes of a kernel's parameters, from its section .nv.info.NAME. Entries of format 4 have a length; those with
   attribute 0x17 describe a parameter: index (4 bytes), ordinal, offset (2 each), and its size in bits 18 on of the last
   word. Sources: "cuobjdump -elf", which prints the same. */
static void read_parameters(Kernel *kernel, const unsigned char *image) {
    const Elf64_Ehdr *header = (const void *)image;
    const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
    const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
    for (int i = 0; i < header->e_shnum; i++) {
        const char *name = names + sections[i].sh_name;
        if (strncmp(name, ".nv.info.", 9) || strcmp(name + 9, kernel->name)) continue;
        const unsigned char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
        while (at + 4 <= end) {
            unsigned format = at[0], attribute = at[1], length = at[2] | at[3] << 8;
            at += 4;
            if (format != 4) continue;
            if (attribute == 0x17) {
                unsigned ordinal = at[4] | at[5] << 8;
                uint32_t word;
                memcpy(&word, at + 8, 4);
                if (ordinal < MOST_PARAMETERS) kernel->bytes[ordinal] = word >> 18;
                if ((int)ordinal >= kernel->count) kernel->count = ordinal + 1;
            }
            at += length;
        }
    }
}

static Result cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d, void *e,
                                unsigned f) {
    const unsigned char *bytes = code;
    if (memcmp(bytes, ELFMAG, SELFMAG) || library_count == MOST_LIBRARIES) return NOT_FOUND;
    const Elf64_Ehdr *header = code;
    size_t size = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
    size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
    void *kept = malloc(size = size > programs ? size : programs); /* the caller's copy may go */
    memcpy(kept, code, size);
    libraries[library_count++] = kept;
    *library = kept;
    return SUCCESS;
}

static Result cuLibraryGetKernel(void **found, const void *library, const char *name) {
    Kernel *kernel = calloc(1, sizeof *kernel);
    snprintf(kernel->name, sizeof kernel->name, "%s", name);
    read_parameters(kernel, library);
    *found = kernel;
    return kernel->count <= MOST_PARAMETERS ? SUCCESS : NOT_FOUND;
}

static Result cuLibraryGetModule(void **module, void *library) { *module = library; return SUCCESS; }
static Result cuKernelGetFunction(void **function, void *kernel) { *function = kernel; return SUCCESS; }
static Result cuKernelGetAttribute(int *value, int attribute, void *kernel, int device) {
    *value = attribute == 0 ? 1024 : 32;
    return SUCCESS;
}
static Result cuFuncGetAttribute(int *value, int attribute, void *function) {
    return cuKernelGetAttribute(value, attribute, function, 0);
}

static Result record(const Kernel *kernel, const unsigned shape[6], unsigned shared_bytes, void *stream, void **values) {
    if (launch_result) return launch_result;
    if (!current_context) return INVALID_CONTEXT;
    if (launch_count == MOST_LAUNCHES) launch_count = 0;
    Launch *launch = &launches[launch_count++];
    launch->name = kernel->name;
    memcpy(launch->shape, shape, sizeof launch->shape);
    launch->shared_bytes = shared_bytes;
    launch->stream = stream;
    launch->count = kernel->count;
    memcpy(launch->bytes, kernel->bytes, sizeof launch->bytes);
    for (int i = 0; i < kernel->count; i++) {
        launch->values[i] = 0;
        memcpy(&launch->values[i], values[i], kernel->bytes[i]);
    }
    return SUCCESS;
}

static Result cuLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                             unsigned shared_bytes, void *stream, void **values, void **extra) {
    return record(kernel, (unsigned[]){gx, gy, gz, bx, by, bz}, shared_bytes, stream, values);
}

typedef struct {
    unsigned shape[6], shared_bytes;
    void *stream, *attributes;
    unsigned attribute_count;
} LaunchConfig;

static Result cuLaunchKernelEx(const LaunchConfig *config, void *kernel, void **values, void **extra) {
    return record(kernel, config->shape, config->shared_bytes, config->stream, values);
}

static Result cuGetErrorName(int result, const char **name) { *name = "STUB_ERROR"; return SUCCESS; }
static Result cuGetErrorString(int result, const char **text) { *text = "an error of the stub"; return SUCCESS; }

/* What is asked for by name ------------------------------------------------------------------------------------------ */

static Result succeed(void) { return SUCCESS; } /* for everything that the tests need no answer of */

static const struct {
    const char *name;
    void *function;
} TABLE[] = {
#define ENTRY(name) {#name, (void *)name}
#define ENTRY_V2(name) {#name, (void *)name##_v2}
    ENTRY(cuDriverGetVersion), ENTRY(cuDeviceGetCount), ENTRY(cuDeviceGet), ENTRY(cuDeviceGetName),
    ENTRY_V2(cuDeviceGetUuid), ENTRY_V2(cuDeviceTotalMem), ENTRY(cuDeviceGetAttribute),
    ENTRY(cuDevicePrimaryCtxRetain), ENTRY(cuDevicePrimaryCtxGetState), ENTRY(cuCtxGetCurrent), ENTRY(cuCtxSetCurrent),
    ENTRY_V2(cuCtxPushCurrent), ENTRY_V2(cuCtxPopCurrent), ENTRY(cuCtxGetDevice), ENTRY(cuStreamGetCtx),
    ENTRY_V2(cuMemAlloc), ENTRY_V2(cuMemFree), ENTRY_V2(cuMemGetInfo), ENTRY(cuLibraryLoadData),
    ENTRY(cuLibraryGetKernel), ENTRY(cuLibraryGetModule), ENTRY(cuKernelGetFunction), ENTRY(cuKernelGetAttribute),
    ENTRY(cuFuncGetAttribute), ENTRY(cuLaunchKernel), ENTRY(cuLaunchKernelEx), ENTRY(cuGetErrorName),
    ENTRY(cuGetErrorString),
    {"cuMemcpyHtoD", (void *)copy}, {"cuMemcpyDtoH", (void *)copy},
    {"cuMemcpyHtoDAsync", (void *)copy_async}, {"cuMemcpyDtoHAsync", (void *)copy_async},
};

Result cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, int *status) {
    *function = (void *)succeed;
    if (!strcmp(name, "cuGetProcAddress") || !strcmp(name, "cuGetProcAddress_v2")) *function = (void *)cuGetProcAddress_v2;
    for (size_t i = 0; i < sizeof TABLE / sizeof *TABLE; i++)
        if (!strcmp(name, TABLE[i].name)) *function = TABLE[i].function;
    if (status) *status = 0;
    return SUCCESS;
}

Result cuGetProcAddress(const char *name, void **function, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, function, version, flags, NULL);
}

Result cuInit(unsigned flags) { return SUCCESS; }
