//! Huge pages under a machine that has not been cut yet.
//!
//! A first cut maps the memory file anew, part by part, and the host takes the old mapping down
//! page by page: on the machine this was written on 40 ms for 512 MiB of ordinary pages, which the
//! guest feels, and a tenth of that for huge ones. Children read huge pages faster as well. A
//! thread therefore turns parts of the file that are at least half full into huge pages, which
//! needs no policy of the host for huge pages in shared memory.
//!
//! Invariants: pages are exchanged only while the top is the shared file, under its lock, so never
//! in a pause; the thread takes at most a third of a processor; what it cannot have it does
//! without.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use format::{Error, Result};
use parking_lot::{Condvar, Mutex};

use super::cut::Top;
use super::image::data_bytes;
use super::{GuestRam, HUGE_PAGE, Span, index};

/// Between two looks at memory that changed lately, and the longest time between two looks.
const LOOK_AGAIN: Duration = Duration::from_millis(200);
const LOOK_AGAIN_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
struct Stop {
    said: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Waits for `time`; true when it is time to stop.
    fn wait(&self, time: Duration) -> bool {
        let mut said = self.said.lock();
        self.changed.wait_while_for(&mut said, |said| !*said, time);
        *said
    }
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Collapser {
    stop: Arc<Stop>,
    huge: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Collapser {
    /// Starts on `ram`, whose content `top` says.
    pub(crate) fn start(ram: &Arc<GuestRam>, top: &Arc<Mutex<Top>>) -> Result<Collapser> {
        let (stop, huge) = (Arc::<Stop>::default(), Arc::<AtomicU64>::default());
        let work = (Arc::clone(ram), Arc::clone(top), Arc::clone(&stop), Arc::clone(&huge));
        let thread = std::thread::Builder::new().name("huge pages".into());
        let thread = thread
            .spawn(move || run(&work.0, &work.1, &work.2, &work.3))
            .map_err(|e| Error::from(e).tried("start").on("the thread for huge pages"))?;
        Ok(Collapser { stop, huge, thread: Some(thread) })
    }

    /// Bytes that were made huge pages.
    pub(crate) fn huge_bytes(&self) -> u64 {
        self.huge.load(Ordering::Relaxed) // a statistic
    }
}

impl Drop for Collapser {
    fn drop(&mut self) {
        *self.stop.said.lock() = true;
        self.stop.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was reported by the thread.
            let _ = thread.join();
        }
    }
}

fn run(ram: &GuestRam, top: &Mutex<Top>, stop: &Stop, huge: &AtomicU64) {
    let mut done = vec![false; index(ram.size() / HUGE_PAGE)];
    let mut idle = LOOK_AGAIN;
    while !stop.wait(idle) {
        idle = (idle * 2).min(LOOK_AGAIN_MAX);
        for (part, done) in (0..).zip(&mut done).filter(|(_, done)| !**done) {
            let began = Instant::now();
            let span = Span { start: part * HUGE_PAGE, len: HUGE_PAGE };
            match collapse(ram, &top.lock(), span) {
                Outcome::Huge => {
                    *done = true;
                    huge.fetch_add(HUGE_PAGE, Ordering::Relaxed); // a statistic
                    idle = LOOK_AGAIN;
                    if stop.wait(began.elapsed() * 2) {
                        return;
                    }
                }
                Outcome::Later => {}
                Outcome::Never => return,
            }
        }
    }
}

enum Outcome {
    Huge,
    Later,
    Never,
}

fn collapse(ram: &GuestRam, top: &Top, span: Span) -> Outcome {
    let Top::Shared { file, from: 0 } = top else { return Outcome::Never };
    match data_bytes(&**file, span) {
        Ok(bytes) if bytes < HUGE_PAGE / 2 => return Outcome::Later,
        Ok(_) => {}
        Err(_) => return Outcome::Never,
    }
    let at = ram.at_offset(span.start).as_ptr().cast();
    // SAFETY: the span is RAM and shared; its content stays the same.
    if unsafe { libc::madvise(at, index(span.len), libc::MADV_COLLAPSE) } == 0 {
        return Outcome::Huge;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        // The pages are in use, or there is no huge page to be had right now.
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM) => Outcome::Later,
        _ => Outcome::Never,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Gpa, PAGE};

    #[test]
    fn half_full_parts_become_huge_and_keep_their_content() {
        let ram = Arc::new(GuestRam::reserve(4 * HUGE_PAGE).unwrap());
        let top = Arc::new(Mutex::new(Top::shared(&ram).unwrap()));
        for page in (0..300).chain([1024]) {
            ram.write(Gpa(page * PAGE), &page.to_le_bytes()).unwrap();
        }
        let collapser = Collapser::start(&ram, &top).unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while collapser.huge_bytes() == 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        // A kernel may have no huge pages; then there is nothing to see, and nothing may change.
        assert!(collapser.huge_bytes() <= HUGE_PAGE, "a part that is almost empty became huge");
        for page in (0..300).chain([1024]) {
            let mut seen = [0; 8];
            ram.read(Gpa(page * PAGE), &mut seen).unwrap();
            assert_eq!(u64::from_le_bytes(seen), page);
        }
    }
}
