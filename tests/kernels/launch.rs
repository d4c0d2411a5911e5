//! Launching a kernel with typed arguments.

/// Launches a kernel in some order of its threads: the arguments must be of the kernel's types.
macro_rules! launch {
    ($shim:expr, $order:expr, $name:expr, $grid:expr, $threads:expr; $($argument:expr),* $(,)?) => {{
        let mut params: Vec<*mut std::ffi::c_void> = Vec::new();
        let mut boxes: Vec<Box<dyn std::any::Any>> = Vec::new();
        $(
            let mut boxed = Box::new($argument);
            params.push(std::ptr::from_mut(boxed.as_mut()).cast());
            boxes.push(boxed);
        )*
        // SAFETY: the tests give each kernel what it asks for.
        unsafe { $shim.launch($name, $grid, $threads, &params, $order) };
    }};
}
pub(crate) use launch;
