//! What holds only where the processor lets KVM decide what a guest in ring 3 sees: features and
//! time. There are hosts whose processors tell a guest of themselves, whatever KVM was asked for.

use std::arch::x86_64::_rdtsc;
use std::time::Duration;

use forkd::kvm::blob::Reader;
use forkd::kvm::state::tag;
use forkd::machine::{Image, Machine};
use format::Kind;

use super::{Check, MIB, Seen, altered, child_of};
use crate::payload::{Guest, Op, identity};

/// The checks of this file, which are no part of [`super::ALL`].
pub const EXACT: [Check; 3] = [
    ("processor-features", processor_features),
    ("time-goes-on", time_goes_on),
    ("refused-registers", refused_registers),
];

/// A row of the table of features: leaf, part, EAX, EBX, ECX, EDX.
type Row = [u32; 6];

fn row_of(bytes: &[u8]) -> Row {
    let word = |i: usize| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("4 bytes"));
    [word(0), word(1), word(3), word(4), word(5), word(6)]
}

/// What a machine was told about its processors.
fn table_of(image: &Image) -> Vec<Row> {
    let state = Reader::new(&image.state).expect("a state");
    let table = state.section(tag::CPUID, 0).expect("a table");
    table.chunks_exact(40).map(row_of).collect()
}

/// The registers that are features only: of each leaf, which ones, and without which bits: those
/// that follow control registers.
const FEATURES: [(u32, usize, u32); 8] = [
    (1, 2, 1 << 27 | 1 << 3),
    (1, 3, 0),
    (7, 1, 0),
    (7, 2, 1 << 4),
    (0x4000_0001, 0, 0),
    (0x8000_0001, 2, 0),
    (0x8000_0001, 3, 0),
    (0x8000_0008, 1, 0),
];

fn sees_its_table(guest: &Guest, table: &[Row], who: &str) {
    for (leaf, register, but) in FEATURES {
        let Some(row) = table.iter().find(|row| (row[0], row[1]) == (leaf, 0)) else { continue };
        let told = guest.ask(Op::Processor, [leaf.into(), 0, register as u64]);
        let (told, meant) = (u32::try_from(told).expect("32 bits"), row[2 + register]);
        assert_eq!(told & !but, meant & !but, "{who}: leaf {leaf:#x}, register {register}");
    }
}

/// A guest sees the features that forkd has decided on; the child of a machine that had fewer sees
/// those, and so does its own child.
fn processor_features() -> Seen {
    let mut seen = Seen::default();
    let parent = Guest::start(4 * MIB, 1);
    let image = parent.cut();
    let table = table_of(&image);
    sees_its_table(&parent, &table, "a machine that booted");
    let bits = table.iter().find(|row| row[0] == 7).map_or(0, |row| row[3]);
    assert_ne!(bits, 0, "there is a feature to take away");
    let without = 1u32 << bits.trailing_zeros();
    let fewer = altered(&image, |tag, _, content| {
        let rows = content.chunks_exact_mut(40);
        if tag == tag::CPUID {
            let mut leaf = rows.filter(|row| row_of(row)[0] == 7);
            let row = leaf.next().expect("the leaf");
            row[16..20].copy_from_slice(&(bits & !without).to_le_bytes());
        }
    });
    let child = child_of(&fewer, &parent);
    child.machine.resume().expect("the child runs");
    sees_its_table(&child, &table_of(&fewer), "a machine that had fewer");
    let second = child.cut();
    assert_eq!(table_of(&second), table_of(&fewer));
    let grandchild = child_of(&second, &child);
    grandchild.machine.resume().expect("the grandchild runs");
    sees_its_table(&grandchild, &table_of(&fewer), "its child");
    seen.word(FEATURES.len() as u64);
    seen
}

fn host_time() -> u64 {
    // SAFETY: every processor that runs guests has the counter.
    unsafe { _rdtsc() }
}

/// A child's time stamp counter goes on from where its parent's was: not back, and by no more than
/// has passed; however much younger than the parent the shell is. (KVM takes a counter that is set
/// to within a second of the one that is there for an attempt to have processors in step.)
fn time_goes_on() -> Seen {
    let mut seen = Seen::default();
    for younger_ms in [100, 700, 1500] {
        let parent = Guest::start(4 * MIB, 2);
        std::thread::sleep(Duration::from_millis(younger_ms));
        let shell = Machine::shell(&parent.class()).expect("a shell");
        let began = host_time();
        let before = parent.ask(Op::Time, [0; 3]);
        let child = Guest::child_in(shell, &parent.cut(), &identity(1)).expect("a child");
        child.machine.resume().expect("the child runs");
        for cpu in [0, 1] {
            child.tell(cpu, Op::Time, [0; 3]);
            let after = child.answer(cpu);
            let most = before + (host_time() - began);
            assert!(
                (before..=most).contains(&after),
                "processor {cpu} in a shell that is {younger_ms} ms younger: {after} is not \
                 within {before} and {most}"
            );
        }
        seen.word(younger_ms);
    }
    seen
}

/// A register that KVM refuses is named, and no machine is made.
fn refused_registers() -> Seen {
    /// Where the kernel of a guest is entered, and an address that cannot be one.
    const ENTRY: (u32, u64) = (0xc000_0082, 1 << 63);
    let mut seen = Seen::default();
    let guest = Guest::new(4 * MIB, 1);
    let image = altered(&guest.cut(), |tag, _, content| {
        let mut entries = content.chunks_exact_mut(16);
        if tag == tag::MSRS {
            let entry = entries.find(|entry| entry[..4] == ENTRY.0.to_le_bytes());
            entry.expect("the register")[8..].copy_from_slice(&ENTRY.1.to_le_bytes());
        }
    });
    let e = Guest::child(&image, guest.class(), &identity(1)).expect_err("a refused register");
    assert_eq!(e.kind(), Kind::Unsupported, "{e}");
    assert!(e.to_string().contains("refuses register 0xc0000082 = 0x8000000000000000"), "{e}");
    seen.text(&e.to_string());
    seen
}
