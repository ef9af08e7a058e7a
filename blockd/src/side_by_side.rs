//! Work on several things at once.

use std::sync::LazyLock;

/// Processors of this host. Looked up once: the system answers by way of several files.
pub(crate) static PROCESSORS: LazyLock<usize> =
    LazyLock::new(|| std::thread::available_parallelism().map_or(2, usize::from));

/// Does something with each item, a few at a time, on this thread and on others; the results are in
/// order.
pub(crate) fn side_by_side<T: Send, R: Send>(
    items: Vec<T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    const THREADS_MAX: usize = 16;
    /// While one waits for the host's storage, another one has the processor.
    const THREADS_PER_PROCESSOR: usize = 2;
    if items.len() < 2 {
        // A thread costs more than many a piece of work.
        return items.into_iter().map(work).collect();
    }
    let threads = items.len().min(THREADS_MAX).min(*PROCESSORS * THREADS_PER_PROCESSOR);
    let items = parking_lot::Mutex::new(items.into_iter().enumerate());
    let results = parking_lot::Mutex::new(Vec::new());
    let lane = || {
        loop {
            let Some((i, item)) = items.lock().next() else { return };
            let result = work(item);
            results.lock().push((i, result));
        }
    };
    std::thread::scope(|scope| {
        (1..threads).for_each(|_| _ = scope.spawn(lane));
        lane();
    });
    let mut results = results.into_inner();
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}
