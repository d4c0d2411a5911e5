//! NVIDIA's driver library, found at run time: one program runs with and without it.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use cudarc::driver::sys::{self, CUdevice_attribute, CUresult};

use super::driver::{
    Args, CAPABILITY_MIN, Driver, EVENTS, Facts, KernelId, Launch, MATMUL_SHARED_BYTES, Stream,
    VERSION_MIN, version_name,
};
use super::graphs::Graphs;
use crate::arena::PAGE_BYTES;
use crate::error::{Error, Kind, Result};

/// The kernels in PTX for sm_80, and a zero, which the driver compiles for the GPU at hand.
static PTX: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.ptx"));
/// The same assembled for sm_87; empty if there was no ptxas when this was built.
static CUBIN: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/kernels.cubin"));

/// The driver as the loader finds it, and where JetPack has it should the loader not look there: version 6 and later, 5.
const PLACES: [&CStr; 3] = [
    c"libcuda.so.1",
    c"/usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1",
    c"/usr/lib/aarch64-linux-gnu/tegra/libcuda.so.1",
];
/// What the assembled kernels are for.
const CUBIN_CAPABILITY: (u32, u32) = (8, 7);

const CARVEOUT: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
const SHARED_MAX: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// One GPU.
pub(super) struct Nvidia {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// In the order of `Stream`.
    streams: [sys::CUstream; 2],
    events: [sys::CUevent; EVENTS],
    module: sys::CUmodule,
    graphs: Mutex<Graphs>,
    /// Of the kernels that were asked for.
    names: Mutex<Vec<(KernelId, String)>>,
}

// SAFETY: the driver's handles, those of graphs too, may be used from any thread; each call makes the context the thread's
// own first.
unsafe impl Send for Nvidia {}
// SAFETY: as above, and by several at a time.
unsafe impl Sync for Nvidia {}

/// What a result means, if it is not success.
fn check(result: CUresult, doing: &str) -> Result<()> {
    if result == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = ptr::null();
    // SAFETY: a place for the pointer to a static string.
    let known = unsafe { sys::cuGetErrorString(result, &mut text) } == CUresult::CUDA_SUCCESS;
    let text = match known && !text.is_null() {
        // SAFETY: the driver's own string.
        true => unsafe { CStr::from_ptr(text) }
            .to_string_lossy()
            .into_owned(),
        false => format!("error {}", result as u32),
    };
    let (kind, remedy) = match result {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => (
            Kind::Budget,
            "give a smaller --gpu-memory (--memory where it shares the processor's), or free memory on the GPU",
        ),
        CUresult::CUDA_ERROR_NO_DEVICE => (
            Kind::Unsupported,
            "use --device cpu, or a machine with an NVIDIA GPU",
        ),
        CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND => (
            Kind::Unsupported,
            "install the driver's own PTX compiler, libnvidia-ptxjitcompiler.so.1, too, or use --device cpu",
        ),
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION => (
            Kind::Unsupported,
            "update the driver (JetPack 5.1 or later), or use --device cpu",
        ),
        _ => (
            Kind::Io,
            "start again; if it stays so, look at the kernel's log (dmesg) or use --device cpu",
        ),
    };
    Err(Error::new(
        kind,
        format!("the GPU cannot {doing}: {text}"),
        remedy,
    ))
}

fn attribute(device: sys::CUdevice, attribute: CUdevice_attribute) -> Result<u32> {
    let mut value = 0;
    // SAFETY: a place for the value.
    let result = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) };
    check(result, "be asked what it is").map(|()| value as u32)
}

/// What the system could give now without swapping; 0 if it does not say.
fn available_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mut lines = text.lines();
    let found = lines.find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = found.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0) << 10
}

impl Nvidia {
    /// The first GPU, with the kernels loaded.
    ///
    /// # Errors
    /// There is no driver, an old one, no GPU or one without what the kernels need.
    pub(super) fn open() -> Result<Nvidia> {
        let available = available_bytes();
        // The loader's own comes first: an upgrade of JetPack's driver is another library of the same name, and there
        // must be one in a process. A library that was loaded by its path is found by its name afterwards.
        let load = |place: &&CStr| {
            // SAFETY: NVIDIA's own library, which may be loaded at any time; it stays loaded.
            !unsafe { libc::dlopen(place.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) }.is_null()
        };
        PLACES.iter().any(load);
        // SAFETY: loads the library if it is there.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::new(
                Kind::Unsupported,
                "there is no CUDA driver: libcuda.so.1 cannot be loaded",
                "install NVIDIA's driver (on a Jetson: JetPack; in a container: the NVIDIA runtime), or use --device cpu",
            ));
        }
        // SAFETY: plain calls, with places for what they answer.
        unsafe {
            check(sys::cuInit(0), "be used")?;
            let mut version = 0;
            check(sys::cuDriverGetVersion(&mut version), "tell its driver")?;
            let version = version as u32;
            if version < VERSION_MIN {
                return Err(Error::new(
                    Kind::Unsupported,
                    format!("the CUDA driver is of version {}", version_name(version)),
                    format!(
                        "update it to {} or later (JetPack 5.1 has 11.4), or use --device cpu",
                        version_name(VERSION_MIN)
                    ),
                ));
            }
            let mut device = 0;
            check(sys::cuDeviceGet(&mut device, 0), "be found")?;
            let facts = facts(device)?;
            let mut context = ptr::null_mut();
            check(
                sys::cuDevicePrimaryCtxRetain(&mut context, device),
                "be opened",
            )?;
            let mut nvidia = Nvidia {
                facts,
                device,
                context,
                streams: [ptr::null_mut(); 2],
                events: [ptr::null_mut(); EVENTS],
                module: ptr::null_mut(),
                graphs: Mutex::new(Graphs::new()),
                names: Mutex::default(),
            };
            nvidia.bind()?;
            let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            for stream in &mut nvidia.streams {
                check(sys::cuStreamCreate(stream, flags), "open a stream")?;
            }
            for event in &mut nvidia.events {
                let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                check(sys::cuEventCreate(event, flags), "make an event")?;
            }
            nvidia.load()?;
            if nvidia.facts.integrated {
                nvidia.facts.context_bytes = available.saturating_sub(available_bytes());
            }
            Ok(nvidia)
        }
    }

    /// Makes the context this thread's.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained.
        check(unsafe { sys::cuCtxSetCurrent(self.context) }, "be used")
    }

    /// Loads the kernels: as assembled where that fits the GPU, else compiled by the driver.
    fn load(&mut self) -> Result<()> {
        if !CUBIN.is_empty() && self.facts.capability == CUBIN_CAPABILITY {
            // SAFETY: a whole cubin.
            let loaded = unsafe { sys::cuModuleLoadData(&mut self.module, CUBIN.as_ptr().cast()) };
            if loaded == CUresult::CUDA_SUCCESS {
                return Ok(());
            }
            log::info!("the assembled kernels do not load ({loaded:?}); the driver compiles them");
        }
        assert_eq!(PTX.last(), Some(&0), "build.rs ends the text with a zero");
        // What is wrong with the PTX, should it not compile.
        let mut told = [0_u8; 2048];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        ];
        let mut values = [
            told.as_mut_ptr().cast(),
            ptr::without_provenance_mut(told.len()),
        ];
        let begun = Instant::now();
        // SAFETY: PTX that ends with a zero, and options with their values: a buffer, and its size.
        let loaded = unsafe {
            sys::cuModuleLoadDataEx(
                &mut self.module,
                PTX.as_ptr().cast(),
                options.len() as u32,
                options.as_mut_ptr(),
                values.as_mut_ptr(),
            )
        };
        // The driver keeps what it compiled, so this takes long once.
        log::info!("the driver had the kernels after {:.1?}", begun.elapsed());
        let told = CStr::from_bytes_until_nul(&told).unwrap_or_default();
        let doing = match told.is_empty() {
            true => "load the kernels".to_owned(),
            false => format!("load the kernels ({})", told.to_string_lossy().trim()),
        };
        check(loaded, &doing)
    }

    /// What a kernel is called, for people.
    fn name(&self, kernel: KernelId) -> String {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = names.iter().find(|(id, _)| *id == kernel);
        name.map_or("a kernel".to_owned(), |(_, name)| name.clone())
    }
}

fn facts(device: sys::CUdevice) -> Result<Facts> {
    let mut name = [0; 96];
    // SAFETY: the array and its length.
    let named = unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device) };
    check(named, "tell its name")?;
    // SAFETY: the driver ends the name with a zero.
    let name = unsafe { CStr::from_ptr(name.as_ptr()) }
        .to_string_lossy()
        .into_owned();
    let of = |a| attribute(device, a);
    let capability = (
        of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    if capability < CAPABILITY_MIN {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "{name} has compute capability {}.{}",
                capability.0, capability.1
            ),
            format!(
                "use a GPU of {}.{} or later, or --device cpu",
                CAPABILITY_MIN.0, CAPABILITY_MIN.1
            ),
        ));
    }
    if of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED)? == 0 {
        return Err(Error::new(
            Kind::Unsupported,
            format!("{name} cannot compute on the processor's memory"),
            "use --device cpu",
        ));
    }
    Ok(Facts {
        name,
        capability,
        integrated: of(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED)? != 0,
        context_bytes: 0,
    })
}

impl Driver for Nvidia {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn free_bytes(&self) -> Result<u64> {
        self.bind()?;
        let (mut free, mut all) = (0, 0);
        // SAFETY: places for the answers.
        let told = unsafe { sys::cuMemGetInfo_v2(&mut free, &mut all) };
        check(told, "tell its free memory").map(|()| free as u64)
    }

    fn allocate(&self, bytes: usize) -> Result<u64> {
        self.bind()?;
        let mut address = 0;
        // SAFETY: a place for the address.
        let allocated = unsafe { sys::cuMemAlloc_v2(&mut address, bytes) };
        check(
            allocated,
            &format!("give {} MiB of its memory", bytes.div_ceil(1 << 20)),
        )
        .map(|()| address)
    }

    unsafe fn free(&self, address: u64) {
        let unbound = self.bind();
        // SAFETY: the caller vouches for it.
        let freed = unsafe { sys::cuMemFree_v2(address) };
        if let Err(error) = unbound.and(check(freed, "take memory back")) {
            log::debug!("{error}");
        }
    }

    unsafe fn register(&self, base: NonNull<u8>, bytes: usize) -> Result<u64> {
        self.bind()?;
        // Drivers have not always taken parts of pages, and the whole of the last one is mapped too.
        let bytes = bytes.next_multiple_of(PAGE_BYTES);
        let memory = base.as_ptr().cast::<c_void>();
        let mut address = 0;
        // SAFETY: the caller vouches for the memory.
        unsafe {
            let flags = sys::CU_MEMHOSTREGISTER_DEVICEMAP;
            check(
                sys::cuMemHostRegister_v2(memory, bytes, flags),
                "register the arena",
            )?;
            check(
                sys::cuMemHostGetDevicePointer_v2(&mut address, memory, 0),
                "map the arena",
            )?;
        }
        Ok(address)
    }

    unsafe fn unregister(&self, base: NonNull<u8>) {
        let unbound = self.bind();
        // SAFETY: the caller registered it.
        let result = unsafe { sys::cuMemHostUnregister(base.as_ptr().cast()) };
        if let Err(error) = unbound.and(check(result, "let the arena go")) {
            log::debug!("{error}");
        }
    }

    fn kernel(&self, name: &str) -> Result<KernelId> {
        self.bind()?;
        let c_name = CString::new(name).expect("kernels' names have no zeros");
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded.
        let found =
            unsafe { sys::cuModuleGetFunction(&mut function, self.module, c_name.as_ptr()) };
        check(found, &format!("find the kernel {name}"))?;
        // What takes weights through shared memory runs in as many blocks as that has room for, and `matmul` takes more
        // than kernels may without being asked.
        let attributes: &[_] = match name.split('_').next() {
            Some("matvec" | "matpanel") => &[(CARVEOUT, 100)],
            Some("matmul") => &[(CARVEOUT, 100), (SHARED_MAX, MATMUL_SHARED_BYTES as c_int)],
            _ => &[],
        };
        for &(attribute, value) in attributes {
            // SAFETY: the function is of this module, which lives.
            let set = unsafe { sys::cuFuncSetAttribute(function, attribute, value) };
            check(set, &format!("give shared memory to {name}"))?;
        }
        let kernel = KernelId(function.expose_provenance() as u64);
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.push((kernel, name.to_owned()));
        Ok(kernel)
    }

    unsafe fn launch(
        &self,
        kernel: KernelId,
        [x, y, z]: [u32; 3],
        threads: u32,
        args: &Args,
    ) -> Result<()> {
        self.bind()?;
        let function = ptr::with_exposed_provenance_mut(kernel.0 as usize);
        let mut pointers = args.pointers();
        // SAFETY: the function is of this module, and the caller vouches for its arguments, which are copied.
        let launched = unsafe {
            sys::cuLaunchKernel(
                function,
                x,
                y,
                z,
                threads,
                1,
                1,
                args.shared_bytes(),
                self.streams[Stream::Compute as usize],
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        };
        match launched {
            CUresult::CUDA_SUCCESS => Ok(()),
            _ => check(launched, &format!("run {}", self.name(kernel))),
        }
    }

    unsafe fn launch_all(&self, place: usize, launches: &[Launch]) -> Result<()> {
        self.bind()?;
        let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
        match graphs.launch(place, launches, self.streams[Stream::Compute as usize]) {
            Ok(true) => return Ok(()),
            Ok(false) => (),
            Err(error) => {
                log::info!(
                    "the driver makes no graphs of launches ({error:?}): each goes by itself"
                );
                graphs.give_up();
            }
        }
        // SAFETY: the caller vouches for them.
        unsafe { self.launch_each(launches) }
    }

    unsafe fn copy(&self, stream: Stream, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.bind()?;
        let stream = self.streams[stream as usize];
        // SAFETY: the caller vouches for the ranges.
        check(
            unsafe { sys::cuMemcpyAsync(to, from, bytes, stream) },
            "copy",
        )
    }

    fn record(&self, stream: Stream, event: usize) -> Result<()> {
        self.bind()?;
        let stream = self.streams[stream as usize];
        // SAFETY: both are this context's.
        check(
            unsafe { sys::cuEventRecord(self.events[event], stream) },
            "mark a place",
        )
    }

    fn done(&self, event: usize) -> Result<bool> {
        self.bind()?;
        // SAFETY: the event is this context's.
        match unsafe { sys::cuEventQuery(self.events[event]) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check(result, "go on").map(|()| true),
        }
    }
}

impl Drop for Nvidia {
    fn drop(&mut self) {
        // SAFETY: all were made by `open` where they are not null, and nothing else has them.
        let closed = unsafe {
            let mut results = vec![sys::cuCtxSetCurrent(self.context)];
            results.extend(self.streams.map(|stream| sys::cuStreamSynchronize(stream)));
            let mut graphs = self.graphs.lock().unwrap_or_else(PoisonError::into_inner);
            graphs.give_up();
            results.push(sys::cuModuleUnload(self.module));
            results.extend(self.events.map(|event| sys::cuEventDestroy_v2(event)));
            results.extend(self.streams.map(|stream| sys::cuStreamDestroy_v2(stream)));
            results.push(sys::cuDevicePrimaryCtxRelease_v2(self.device));
            results
        };
        if closed.iter().any(|&r| r != CUresult::CUDA_SUCCESS) {
            log::debug!("closing the GPU: {closed:?}");
        }
    }
}
