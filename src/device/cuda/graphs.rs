//! Batches of launches as CUDA graphs, which the driver gives to the GPU at once.
//!
//! The batches of one sweep are those of the last one at the same places, as long as the same rows decode: then a batch
//! that comes a second time is made a graph, and from then on only the nodes whose arguments differ are told of it. A
//! batch of other kernels takes the place of the one before, and is launched by itself until it comes again.
#![allow(unsafe_code)]

use std::ptr;

use cudarc::driver::sys::{self, CUresult};

use super::batches::LAUNCHES_MAX;
use super::driver::Launch;

/// Batches of a sweep that are kept.
const PLACES: usize = 32;

/// A graph, and the same made ready.
struct Graph {
    graph: sys::CUgraph,
    ready: sys::CUgraphExec,
}

/// A batch as it came last, and its graph with the nodes if it came twice.
struct Kept {
    launches: Vec<Launch>,
    nodes: Vec<sys::CUgraphNode>,
    graph: Option<Graph>,
}

/// The batches of a sweep, by their places.
pub(super) struct Graphs(Vec<Kept>);

fn ok(result: CUresult) -> Result<(), CUresult> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        failed => Err(failed),
    }
}

/// Does something with the parameters of a launch's node.
fn with_node<T>(launch: &Launch, work: impl FnOnce(*const sys::CUDA_KERNEL_NODE_PARAMS) -> T) -> T {
    let [x, y, z] = launch.grid;
    let mut pointers = launch.args.pointers();
    let params = sys::CUDA_KERNEL_NODE_PARAMS {
        func: ptr::with_exposed_provenance_mut(launch.kernel.0 as usize),
        gridDimX: x,
        gridDimY: y,
        gridDimZ: z,
        blockDimX: launch.threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: launch.args.shared_bytes(),
        kernelParams: pointers.as_mut_ptr(),
        extra: ptr::null_mut(),
    };
    work(&params)
}

impl Graph {
    /// A graph of launches, each of which waits for the one before it, and its nodes.
    fn new(launches: &[Launch], nodes: &mut Vec<sys::CUgraphNode>) -> Result<Graph, CUresult> {
        let mut made = Graph {
            graph: ptr::null_mut(),
            ready: ptr::null_mut(),
        };
        nodes.clear();
        // SAFETY: a place for the graph.
        ok(unsafe { sys::cuGraphCreate(&mut made.graph, 0) })?;
        for launch in launches {
            let mut node = ptr::null_mut();
            let before = nodes.last().map_or(ptr::null(), ptr::from_ref);
            let count = usize::from(!nodes.is_empty());
            ok(with_node(launch, |params| {
                // SAFETY: a place for the node, the one before it if there is one, and the launch's arguments, which are
                // copied.
                unsafe { sys::cuGraphAddKernelNode(&mut node, made.graph, before, count, params) }
            }))?;
            nodes.push(node);
        }
        // SAFETY: a place for what is made of the graph.
        ok(unsafe { sys::cuGraphInstantiateWithFlags(&mut made.ready, made.graph, 0) })?;
        Ok(made)
    }

    /// Has a node run with other arguments, or in another grid, the next time.
    fn change(&self, node: sys::CUgraphNode, launch: &Launch) -> Result<(), CUresult> {
        ok(with_node(launch, |params| {
            // SAFETY: a node of this graph, and the arguments of its kernel, which are copied.
            unsafe { sys::cuGraphExecKernelNodeSetParams(self.ready, node, params) }
        }))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made by `new` where they are not null. What still runs of them runs to its end.
        unsafe {
            if !self.ready.is_null() {
                sys::cuGraphExecDestroy(self.ready);
            }
            if !self.graph.is_null() {
                sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

impl Graphs {
    pub(super) fn new() -> Graphs {
        let kept = || Kept {
            launches: Vec::with_capacity(LAUNCHES_MAX),
            nodes: Vec::with_capacity(LAUNCHES_MAX),
            graph: None,
        };
        Graphs((0..PLACES).map(|_| kept()).collect())
    }

    /// None are made any more.
    pub(super) fn give_up(&mut self) {
        self.0.clear();
    }

    /// Launches a batch as a graph, if it came at this place before; says whether it did.
    ///
    /// # Errors
    /// The driver cannot; nothing was launched.
    pub(super) fn launch(
        &mut self,
        place: usize,
        launches: &[Launch],
        stream: sys::CUstream,
    ) -> Result<bool, CUresult> {
        let Some(kept) = self.0.get_mut(place) else {
            return Ok(false);
        };
        let same = |(a, b): (&Launch, &Launch)| a.kernel == b.kernel;
        if launches.len() != kept.launches.len() || !launches.iter().zip(&kept.launches).all(same) {
            kept.graph = None;
            kept.launches.clear();
            kept.launches.extend_from_slice(launches);
            return Ok(false);
        }
        let graph = match &kept.graph {
            Some(graph) => {
                let launches = launches.iter().zip(&mut kept.launches);
                for (&node, (new, old)) in kept.nodes.iter().zip(launches) {
                    if new != old {
                        graph.change(node, new)?;
                        old.clone_from(new);
                    }
                }
                graph
            }
            None => {
                kept.launches.clear();
                kept.launches.extend_from_slice(launches);
                kept.graph.insert(Graph::new(launches, &mut kept.nodes)?)
            }
        };
        // SAFETY: the graph is ready, and whoever launches vouches for the arguments of its nodes.
        ok(unsafe { sys::cuGraphLaunch(graph.ready, stream) })?;
        Ok(true)
    }
}
