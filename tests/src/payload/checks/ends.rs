//! How guests end, and what their processors say of faults.

use forkd::machine::{Exit, Reason};
use forkd::wires::NoDisks;
use format::Kind;

use super::{MIB, Seen};
use crate::payload::{GATES, Guest, Op};

/// Each of the guest's own ways to end has its name, and the machine does nothing more. `look` is
/// shown each end.
///
/// # Panics
/// When an end has another name, or the machine goes on.
pub fn every_end(look: impl Fn(&Exit)) -> Seen {
    let mut seen = Seen::default();
    for (op, reason) in [
        (Op::PowerOff, Reason::PowerOff),
        (Op::Reset, Reason::Reset),
        (Op::TripleFault, Reason::TripleFault),
    ] {
        let guest = Guest::start(8 * MIB, 2);
        guest.tell(1, Op::Spin, [u64::MAX, 0, 0]);
        guest.tell(0, op, [GATES.0, GATES.1, 0]);
        let exit = guest.ended();
        assert_eq!(exit.reason, reason, "{exit}");
        look(&exit);
        for refused in [
            guest.machine.resume().expect_err("it has ended"),
            guest.cut_with(&mut NoDisks).expect_err("it has ended"),
        ] {
            assert_eq!(refused.kind(), Kind::Failed);
            assert!(refused.to_string().contains(reason.name()), "{refused}");
        }
        seen.text(reason.name());
    }
    seen
}

/// What a program in ring 3 does wrong reaches the guest's own handler, by the right vector.
///
/// # Panics
/// When another one is reached, or none.
pub fn faults() -> Seen {
    let mut seen = Seen::default();
    for vector in [0, 6, 13, 14] {
        let guest = Guest::start(4 * MIB, 1);
        guest.tell(0, Op::Fault, [vector, 0, 0]);
        let mut complaint = None;
        crate::until("the guest faults", || {
            complaint = guest.panel.complaint();
            complaint.is_some() || guest.machine.exit().is_some()
        });
        let complaint = complaint.unwrap_or_else(|| panic!("vector {vector}: {guest:?}"));
        assert_eq!(complaint, format!("fault [{vector}]"));
        seen.text(&complaint);
    }
    seen
}
