//! Rings written by hand, and what a guest may not put into them. Tests of the daemon use it, too.

use std::sync::Arc;

use vhost_blk::client::{Arena, ClientQueue, GUEST_BASE, QueuePlace};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// Writes rings by hand. Offsets count from the queue's data area.
pub struct Hand {
    pub arena: Arc<Arena>,
    pub place: QueuePlace,
    pub data: u64,
}

impl Hand {
    pub fn new(q: &ClientQueue) -> Hand {
        Hand { arena: q.arena().clone(), place: q.place(), data: q.data().0 }
    }

    pub fn guest(&self, offset: u64) -> u64 {
        GUEST_BASE + self.data + offset
    }

    pub fn desc_at(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.arena.write(at, &addr.to_le_bytes());
        self.arena.write(at + 8, &len.to_le_bytes());
        self.arena.write(at + 12, &flags.to_le_bytes());
        self.arena.write(at + 14, &next.to_le_bytes());
    }

    pub fn desc(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.place.ring.desc + 16 * i, addr, len, flags, next);
    }

    /// Entry `i` of an indirect table at data offset 4096.
    pub fn entry(&self, i: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.desc_at(self.data + 4096 + 16 * i, addr, len, flags, next);
    }

    pub fn table(&self, len: u32) {
        self.desc(0, self.guest(4096), len, INDIRECT, 0);
    }

    pub fn offer(&self, head: u16, idx: u16) {
        self.arena.write(self.place.ring.driver + 4, &head.to_le_bytes());
        self.arena.write(self.place.ring.driver + 2, &idx.to_le_bytes());
    }

    /// A read request of one sector, header at 0, data at 512, status at 100.
    pub fn header(&self, kind: u32) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        self.arena.write(self.data, &header);
    }

    pub fn used(&self) -> u16 {
        let mut idx = [0; 2];
        self.arena.read(self.place.ring.device + 2, &mut idx);
        u16::from_le_bytes(idx)
    }

    pub fn status(&self) -> u8 {
        let mut status = [0];
        self.arena.read(self.data + 100, &mut status);
        status[0]
    }

    /// Empties the ring and fills it with one good request.
    pub fn good(&self) {
        let end = self.place.ring.device + 6 + 8 * u64::from(self.place.size);
        let len = usize::try_from(end - self.place.ring.desc).unwrap();
        self.arena.write(self.place.ring.desc, &vec![0; len]);
        self.header(0);
        self.arena.write(self.data + 100, &[0xff]);
        self.desc(0, self.guest(0), 16, NEXT, 1);
        self.desc(1, self.guest(512), 512, NEXT | WRITE, 2);
        self.desc(2, self.guest(100), 1, WRITE, 0);
        self.offer(0, 1);
    }

    /// Descriptor `i` of a packed ring.
    pub fn packed(&self, i: u64, addr: u64, len: u32, id: u16, flags: u16) {
        self.desc_at(self.place.ring.desc + 16 * i, addr, len, id, flags);
    }

    /// Empties a packed ring and puts one good request into it.
    pub fn good_packed(&self) {
        self.good();
        self.arena.write(self.place.ring.desc, &vec![0; 16 * usize::from(self.place.size)]);
        self.packed(0, self.guest(0), 16, 0, NEXT | AVAIL);
        self.packed(1, self.guest(512), 512, 0, NEXT | WRITE | AVAIL);
        self.packed(2, self.guest(100), 1, 7, WRITE | AVAIL);
    }

    pub fn packed_table(&self, len: u32) {
        self.packed(0, self.guest(4096), len, 7, INDIRECT | AVAIL);
    }

    /// Flags and id of the first descriptor.
    pub fn answer(&self) -> (u16, u16) {
        let mut raw = [0; 4];
        self.arena.read(self.place.ring.desc + 12, &mut raw);
        (u16::from_le_bytes([raw[0], raw[1]]), u16::from_le_bytes([raw[2], raw[3]]))
    }

    /// Writes a value that is likely to hurt into rings, tables or headers. True when the next
    /// request, `idx`, was offered as well, for which the doorbell may ring.
    pub fn scribble(&self, idx: &mut u16, any: &mut dyn FnMut() -> u64) -> bool {
        let ring = self.place.ring;
        let known = [0, 1, 2, 16, 512, 4096, self.guest(0), self.guest(4096), u64::MAX];
        let value = match any() % 12 {
            i @ 0..9 => known[usize::try_from(i).unwrap()],
            _ => any(),
        };
        let at = match any() % 3 {
            0 => ring.desc + 8 * (any() % 32),
            1 => ring.driver + 4 + 2 * (any() % 64),
            _ => self.data + 8 * (any() % 1024),
        };
        let len = if at >= ring.driver && at < ring.device { 2 } else { 8 };
        self.arena.write(at, &value.to_le_bytes()[..len]);
        let next = any().is_multiple_of(8);
        if next {
            *idx = idx.wrapping_add(1);
            self.arena.write(ring.driver + 2, &idx.to_le_bytes());
        }
        next
    }
}

pub type Lie = (&'static str, &'static str, fn(&Hand));

/// What the guest does, what the daemon is to say, and how.
pub const LIES: &[Lie] = &[
    ("index jump", "the available index moved by more", |h| h.offer(0, 1000)),
    ("head outside", "a descriptor number is outside", |h| h.offer(h.place.size, 1)),
    ("next outside", "a descriptor number is outside", |h| {
        h.desc(0, h.guest(0), 16, NEXT, h.place.size);
    }),
    ("loop of one", "a descriptor chain loops", |h| h.desc(0, h.guest(0), 16, NEXT, 0)),
    ("loop of three", "a descriptor chain loops", |h| h.desc(2, h.guest(100), 1, NEXT | WRITE, 1)),
    ("address 0", "not in guest memory", |h| h.desc(1, 0, 512, NEXT | WRITE, 2)),
    ("address past the end", "not in guest memory", |h| {
        h.desc(1, GUEST_BASE + h.arena.size() - 511, 512, NEXT | WRITE, 2);
    }),
    ("address that wraps", "not in guest memory", |h| {
        h.desc(1, u64::MAX - 8, 512, NEXT | WRITE, 2)
    }),
    ("length of 4 GiB", "a descriptor chain is too long", |h| {
        h.desc(1, h.guest(0), u32::MAX, NEXT | WRITE, 2)
    }),
    ("header not in memory", "not in guest memory", |h| h.desc(0, 77, 16, NEXT, 1)),
    ("status not in memory", "not in guest memory", |h| h.desc(2, 77, 1, WRITE, 0)),
    ("readable after writable", "a readable buffer follows", |h| {
        h.desc(2, h.guest(100), 1, 0, 0);
    }),
    ("nothing writable", "no room for its status", |h| {
        h.desc(1, h.guest(512), 512, 0, 0);
    }),
    ("all buffers empty", "no room for its status", |h| h.desc(0, h.guest(0), 0, 0, 0)),
    ("empty table", "no whole number of descriptors", |h| h.table(0)),
    ("table of one and a half", "no whole number of descriptors", |h| h.table(24)),
    ("table outside memory", "not in guest memory", |h| h.desc(0, 4096, 32, INDIRECT, 0)),
    ("table that wraps", "not in guest memory", |h| h.desc(0, u64::MAX - 15, 32, INDIRECT, 0)),
    ("table with a successor", "nested or has a successor", |h| {
        h.desc(0, h.guest(4096), 32, INDIRECT | NEXT, 1);
    }),
    ("table in a table", "nested or has a successor", |h| {
        h.entry(0, h.guest(8192), 32, INDIRECT, 0);
        h.table(32);
    }),
    ("table that loops", "a descriptor chain loops", |h| {
        h.entry(0, h.guest(0), 16, NEXT, 1);
        h.entry(1, h.guest(512), 1, NEXT | WRITE, 1);
        h.table(32);
    }),
    ("table whose next is outside", "a descriptor number is outside", |h| {
        h.entry(0, h.guest(0), 16, NEXT, 2);
        h.table(32);
    }),
    ("more segments than anybody needs", "a descriptor chain is too long", |h| {
        for i in 0..1100u16 {
            h.entry(i.into(), h.guest(0), 1, NEXT | WRITE, i + 1);
        }
        h.table(16 * 1101);
    }),
    ("more than 4 GiB in all", "a descriptor chain is too long", |h| {
        let len = u32::try_from(h.arena.size()).unwrap();
        for i in 0..1000u16 {
            h.entry(i.into(), GUEST_BASE, len, NEXT | WRITE, i + 1);
        }
        h.table(16 * 1001);
    }),
];

pub const PACKED_LIES: &[Lie] = &[
    ("loop", "a descriptor chain loops", |h| {
        (0..128).for_each(|i| h.packed(i, h.guest(0), 1, 0, NEXT | AVAIL));
    }),
    ("address outside", "not in guest memory", |h| {
        h.packed(1, 0, 512, 0, NEXT | WRITE | AVAIL);
    }),
    ("address that wraps", "not in guest memory", |h| {
        h.packed(1, u64::MAX, 512, 0, NEXT | WRITE | AVAIL);
    }),
    ("readable after writable", "a readable buffer follows", |h| {
        h.packed(2, h.guest(100), 1, 7, AVAIL);
    }),
    ("nothing writable", "no room for its status", |h| h.packed(0, h.guest(0), 16, 7, AVAIL)),
    ("table in a chain", "nested or has a successor", |h| {
        h.packed(1, h.guest(4096), 32, 0, INDIRECT | AVAIL);
    }),
    ("table with a successor", "nested or has a successor", |h| {
        h.packed(0, h.guest(4096), 32, 0, INDIRECT | NEXT | AVAIL);
    }),
    ("table in a table", "nested or has a successor", |h| {
        h.desc_at(h.data + 4096, h.guest(0), 16, 0, INDIRECT);
        h.packed_table(32);
    }),
    ("empty table", "no whole number of descriptors", |h| h.packed_table(0)),
    ("half a descriptor", "no whole number of descriptors", |h| h.packed_table(8)),
    ("table outside", "not in guest memory", |h| h.packed(0, 0, 32, 7, INDIRECT | AVAIL)),
    ("table of a million", "a descriptor chain is too long", |h| h.packed_table(16 << 20)),
];
