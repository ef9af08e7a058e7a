//! The identity page: who a machine is, for the guest to read.
//!
//! A page of device memory, read-only but for one register. A guest that sees a new generation id
//! takes seed, name and MAC from here and says so by writing the first 8 bytes of the generation id
//! to the acknowledgement register; from then on the seed reads as zero.
//!
//! | offset | bytes | |
//! |---|---|---|
//! | 0x00 | 8 | `OFFSHID1` |
//! | 0x08 | 8 | acknowledgement: reads as what was acknowledged, 0 before |
//! | 0x10 | 16 | generation id |
//! | 0x20 | 16 | id of the machine |
//! | 0x30 | 6 | MAC address |
//! | 0x40 | 32 | seed |
//! | 0x80 | 128 | name, padded with zero bytes |

use super::bus::MmioDevice;
use crate::wires::Identity;

const ACKNOWLEDGE: usize = 0x08;
const GENERATION: usize = 0x10;
const ID: usize = 0x20;
const MAC: usize = 0x30;
const SEED: usize = 0x40;
const NAME: usize = 0x80;
const END: usize = 0x100;

pub(super) struct IdentityPage {
    page: [u8; END],
    /// Called by the vCPU that acknowledges: what is to happen then.
    taken: Box<dyn Fn() + Send>,
}

/// A page of nobody yet.
fn blank() -> [u8; END] {
    let mut page = [0; END];
    page[..ACKNOWLEDGE].copy_from_slice(b"OFFSHID1");
    page
}

impl IdentityPage {
    /// A page of nobody yet; `taken` is called when the guest has taken an identity.
    pub(super) fn new(taken: Box<dyn Fn() + Send>) -> IdentityPage {
        IdentityPage { page: blank(), taken }
    }

    /// Takes an identity that the guest has not seen.
    pub(super) fn set(&mut self, identity: &Identity) {
        self.page = blank();
        let mut put = |at: usize, bytes: &[u8]| {
            self.page[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(GENERATION, &identity.generation_id);
        put(ID, identity.id.as_bytes());
        put(MAC, &identity.mac);
        put(SEED, &identity.seed);
        let name = identity.name.as_bytes();
        put(NAME, &name[..name.len().min(END - NAME)]);
    }

    /// Whether the guest has taken the present identity.
    pub(super) fn is_acknowledged(&self) -> bool {
        self.page[ACKNOWLEDGE..GENERATION] == self.page[GENERATION..GENERATION + 8]
    }
}

impl MmioDevice for IdentityPage {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let page = usize::try_from(offset).ok().and_then(|at| self.page.get(at..));
        for (to, from) in data.iter_mut().zip(page.unwrap_or_default()) {
            *to = *from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let generation = &self.page[GENERATION..GENERATION + 8];
        if usize::try_from(offset) == Ok(ACKNOWLEDGE) && data == generation {
            self.page[ACKNOWLEDGE..GENERATION].copy_from_slice(data);
            self.page[SEED..SEED + 32].fill(0);
            (self.taken)();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            name: "n".repeat(200),
            id: uuid::Uuid::from_bytes([2; 16]),
            generation_id: *b"0123456789abcdef",
            seed: [3; 32],
            mac: [4; 6],
        }
    }

    #[test]
    fn seed_is_there_until_the_right_generation_is_acknowledged() {
        let mut page = IdentityPage::new(Box::new(|| ()));
        page.set(&identity());
        let seed = |page: &mut IdentityPage| {
            let mut seed = [0; 8];
            page.read(0x44, &mut seed);
            seed
        };
        page.write(8, b"76543210");
        page.write(8, b"0123");
        page.write(0x40, &[9; 8]);
        assert!(!page.is_acknowledged() && seed(&mut page) == [3; 8]);
        page.write(8, b"01234567");
        assert!(page.is_acknowledged() && seed(&mut page) == [0; 8]);
        page.set(&Identity { generation_id: [7; 16], ..identity() });
        assert!(!page.is_acknowledged() && seed(&mut page) == [3; 8]);
    }

    #[test]
    fn reads_past_the_end_give_zeroes() {
        let mut page = IdentityPage::new(Box::new(|| ()));
        page.set(&identity());
        let mut data = [1; 8];
        page.read(0xfc, &mut data);
        assert_eq!(data, *b"nnnn\0\0\0\0");
        page.read(u64::MAX, &mut data);
        assert_eq!(data, [0; 8]);
    }
}
