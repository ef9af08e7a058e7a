//! Saved states, compared, and the memory of images.

use std::os::unix::fs::FileExt as _;

use forkd::kvm::blob::Reader;
use forkd::kvm::state::tag;
use forkd::machine::Image;

/// The memory of an image of a machine with `bytes` of it, as a child would find it.
///
/// # Panics
/// When a layer cannot be read.
#[must_use]
pub fn memory_of(image: &Image, bytes: usize) -> Vec<u8> {
    let mut memory = vec![0; bytes];
    for layer in &image.layers {
        let file = std::fs::File::from(layer.file().try_clone_to_owned().expect("a descriptor"));
        for span in layer.spans() {
            let [from, to] = [span.start, span.end()].map(|at| usize::try_from(at).expect("RAM"));
            file.read_exact_at(&mut memory[from..to], span.start).expect("a whole layer");
        }
    }
    memory
}

/// The sections of a state, with everything that is time set to zero.
///
/// # Panics
/// When it is none.
#[must_use]
pub fn parts(state: &[u8]) -> Vec<(String, Vec<u8>)> {
    /// The time stamp counter, and the deadline on it; KVM's clock pages hold no time themselves.
    const OF_TIME: [u32; 2] = [0x10, 0x6e0];
    /// What the timer has left, and the pending timer in the row of requests.
    const TIMER_LEFT: std::ops::Range<usize> = 0x390..0x394;
    let reader = Reader::new(state).expect("a state");
    reader
        .sections()
        .filter(|(tag, _, _)| *tag != tag::CLOCK)
        .map(|(tag, number, content)| {
            let mut content = content.to_vec();
            if tag == tag::LAPIC {
                content[TIMER_LEFT].fill(0);
            }
            if tag == tag::MSRS {
                for entry in content.chunks_exact_mut(16) {
                    let index = u32::from_le_bytes(entry[..4].try_into().expect("4 bytes"));
                    if OF_TIME.contains(&index) {
                        entry[8..].fill(0);
                    }
                }
            }
            (format!("{} {number}", String::from_utf8_lossy(&tag)), content)
        })
        .collect()
}
