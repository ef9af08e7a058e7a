//! Work on several things at once.

/// Does something with each item on threads of its own, a few at a time; the results are in order.
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
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = items.len().min(THREADS_MAX).min(processors * THREADS_PER_PROCESSOR);
    let items = parking_lot::Mutex::new(items.into_iter().enumerate());
    let results = parking_lot::Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some((i, item)) = items.lock().next() else { return };
                    let result = work(item);
                    results.lock().push((i, result));
                }
            });
        }
    });
    let mut results = results.into_inner();
    results.sort_unstable_by_key(|(i, _)| *i);
    results.into_iter().map(|(_, result)| result).collect()
}
