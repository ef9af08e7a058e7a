//! The random number device: the host's random bytes for the guest.
//!
//! It has no thread: the vCPU that announces a request fills it, a bounded number of bytes per
//! request and of requests per announcement. So nothing is ever in work when the machine stands,
//! and no child gets bytes that were fetched for its parent.

use std::sync::Arc;

use format::{Error, Result};
use vhost_blk::queue::{Chain, Queue, QueueSetup};

use super::mmio::{Notifier, VirtioDevice};

const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets; a driver takes less than it asked for.
const BYTES_MAX: usize = 4096;
/// Most looks at the ring for one announcement. A driver has one request at a time.
const ROUNDS_MAX: u32 = 64;

pub(super) struct Rng {
    notifier: Arc<Notifier>,
    queue: Option<Queue>,
    chain: Chain,
}

impl Rng {
    pub(super) fn new(notifier: Arc<Notifier>) -> Rng {
        Rng { notifier, queue: None, chain: Chain::new() }
    }

    /// Answers what waits, at most a ring full. `false` when the driver broke the ring.
    fn answer(queue: &mut Queue, chain: &mut Chain) -> bool {
        for _ in 0..QUEUE_SIZE {
            match queue.pop(chain) {
                Ok(true) => {
                    let written = fill(chain);
                    queue.complete(chain, written);
                }
                Ok(false) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}

/// Fills the front of the writable part with random bytes; returns how many.
fn fill(chain: &Chain) -> u32 {
    let mut written = 0;
    let mut bytes = [0; 256];
    for segment in chain.writable() {
        let mut at = 0;
        while at < segment.len() && written < BYTES_MAX {
            let len = bytes.len().min(segment.len() - at).min(BYTES_MAX - written);
            // SAFETY: the buffer is valid for `len` bytes. Requests of up to 256 bytes are neither
            // cut short nor interrupted once the host's generator is seeded, which it long is.
            let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), len, 0) };
            if usize::try_from(got) != Ok(len) {
                return u32::try_from(written).unwrap_or(0);
            }
            segment.part(at, len).copy_from(&bytes[..len]);
            (at, written) = (at + len, written + len);
        }
    }
    u32::try_from(written).unwrap_or(0)
}

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        4
    }

    fn queues(&self) -> u16 {
        1
    }

    fn queue_size_max(&self) -> u16 {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn config_generation(&self) -> u32 {
        0
    }

    fn start(&mut self, _features: u64, rings: Vec<QueueSetup>) -> Result<()> {
        let setup = rings.into_iter().next().ok_or_else(|| Error::invalid("no queue"))?;
        let queue = self.queue.insert(Queue::new(setup)?);
        // What was announced before we looked is answered by `notify`.
        let _ = queue.enable_kicks();
        Ok(())
    }

    fn stop(&mut self) {
        self.queue = None;
    }

    fn notify(&mut self, _queue: u16) {
        let Some(queue) = &mut self.queue else { return };
        for _ in 0..ROUNDS_MAX {
            if !Rng::answer(queue, &mut self.chain) {
                break;
            }
            if queue.publish() {
                self.notifier.used();
            }
            if !queue.enable_kicks() {
                return;
            }
        }
        // It broke its ring, or keeps this vCPU here by filling it from another one.
        self.queue = None;
        self.notifier.needs_reset();
    }

    fn bases(&self) -> Vec<u32> {
        self.queue.iter().map(Queue::base).collect()
    }

    fn save(&self) -> serde_json::Value {
        serde_json::Value::Null
    }

    fn restore(&mut self, _state: &serde_json::Value) -> Result<()> {
        Ok(())
    }
}
