//! Forks through the command line, with a daemon and without one (D-h, D-j, D-k, D-l, D-n): a disk
//! goes on, its children start out with what it held, and none sees what another writes.

use offshoot_tests::command::{Bench, each};
use offshoot_tests::pattern;
use offshoot_tests::rng::{Rng, seed};

/// D-h, D-k.
#[test]
fn parent_and_children_go_on_apart() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "16M"]);
        b.write("vm", 0, &pattern::bytes(1, 0, 600));
        let before = b.read("vm");
        let forked = b.json(&["disk", "fork", "vm", "one", "two"]);
        assert_eq!(forked["children"].as_array().unwrap().len(), 2, "{forked}");
        for child in ["one", "two"] {
            assert!(b.read(child) == before, "{child} holds what its parent held");
        }

        b.write("vm", 4096, &pattern::bytes(2, 8, 100));
        b.write("one", 512, &pattern::bytes(3, 1, 100));
        let (vm, one) = (b.read("vm"), b.read("one"));

        assert!(b.read("two") == before, "nobody writes to a sibling");
        assert_eq!(vm[4096..4096 + 51_200], pattern::bytes(2, 8, 100));
        assert!(vm[..4096] == before[..4096] && vm[55_296..] == before[55_296..]);
        assert_eq!(one[512..51_712], pattern::bytes(3, 1, 100));
        assert!(one[..512] == before[..512] && one[51_712..] == before[51_712..]);
        b.is_sound(&["vm", "one", "two"]);
    });
}

/// D-j: zeroes over data of an ancestor are inherited.
#[test]
fn zeroes_are_inherited() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "16M"]);
        b.write("vm", 0, &pattern::bytes(1, 0, 1024));
        b.done(&["disk", "fork", "vm", "base"]);
        b.done(&["disk", "discard", "vm", "--offset", "64k", "--length", "128k"]);
        b.done(&["disk", "fork", "vm", "child"]);
        b.done(&["disk", "fork", "child", "grandchild"]);

        for disk in ["vm", "child", "grandchild"] {
            let bytes = b.read(disk);
            assert!(bytes[65_536..196_608].iter().all(|byte| *byte == 0), "{disk}");
            assert_eq!(bytes[..65_536], pattern::bytes(1, 0, 128));
        }
        assert_eq!(b.read("base")[..524_288], pattern::bytes(1, 0, 1024));
    });
}

/// D-l: what disks stand on stays as long as one does, and goes with the last.
#[test]
fn disks_are_removed_in_any_order() {
    let seed = seed(7);
    println!("repeat with OFFSHOOT_SEED={seed} cargo test -p offshoot-tests --test fork");
    each(|b| {
        let mut rng = Rng::new(seed);
        b.done(&["disk", "create", "d0", "--size", "16M"]);
        b.write("d0", 0, &pattern::bytes(1, 0, 256));
        let mut live = vec![("d0".to_owned(), b.read("d0"))];
        for n in 1..8 {
            let from = usize::try_from(rng.below(live.len() as u64)).unwrap();
            let (parent, content) = live[from].clone();
            let child = format!("d{n}");
            b.done(&["disk", "fork", &parent, &child]);
            live.push((child.clone(), content));
            let at = rng.below(200) * 4096;
            b.write(&child, at, &pattern::bytes(n + 1, at / 512, 64));
            live.last_mut().unwrap().1 = b.read(&child);
        }
        while !live.is_empty() {
            let (gone, _) =
                live.swap_remove(usize::try_from(rng.below(live.len() as u64)).unwrap());
            b.done(&["disk", "rm", &gone]);
            for (name, content) in &live {
                assert!(b.read(name) == *content, "{name}, after {gone} went");
            }
        }
        assert_eq!(b.segments(), 0);
    });
}

/// D-n: several disks, all or none.
#[test]
fn a_group_is_forked_whole_or_not_at_all() {
    each(|b| {
        for (tag, name) in [(1, "data"), (2, "log")] {
            b.done(&["disk", "create", name, "--size", "16M"]);
            b.write(name, 0, &pattern::bytes(tag, 0, 64));
        }
        let before = b.segments();
        let said = b.refused(&["disk", "fork", "data", "data2", "--with", "log:data"], 2);
        assert!(said.contains("data"), "{said}");
        let said = b.refused(&["disk", "fork", "data", "data2", "--with", "nothing:log2"], 3);
        assert!(said.contains("nothing"), "{said}");
        assert_eq!(b.segments(), before);

        b.done(&["disk", "fork", "data", "data2", "--with", "log:log2,log3"]);

        assert!(b.read("data2") == b.read("data"));
        assert!(b.read("log3") == b.read("log") && b.read("log2") == b.read("log"));
    });
}

#[test]
fn what_cannot_be_forked_is_refused_by_name() {
    each(|b| {
        b.done(&["disk", "create", "vm", "--size", "16M"]);
        b.done(&["disk", "create", "sealed", "--size", "16M"]);
        b.done(&["disk", "seal", "sealed"]);
        let said = b.refused(&["disk", "fork", "sealed", "child"], 2);
        assert!(said.contains("sealed") && said.contains("--parent"), "{said}");
        let said = b.refused(&["disk", "fork", "vm", "sealed"], 4);
        assert!(said.contains("disk sealed") && said.contains("exists"), "{said}");
        let said = b.refused(&["disk", "fork", "vm", "bad/name"], 2);
        assert!(said.contains("bad/name"), "{said}");
        let said = b.refused(&["disk", "fork", "vm", "a", "a"], 2);
        assert!(said.contains("twice"), "{said}");
        b.refused(&["disk", "fork", "nobody", "a"], 3);
        b.refused(&["disk", "fork", "vm"], 2);
        assert_eq!(b.json(&["disk", "ls"]).as_array().unwrap().len(), 2);
    });
}

/// A fork that lost its catalogue is known by its segments.
#[test]
fn a_rebuilt_catalogue_knows_what_was_frozen() {
    let b = Bench::new(false);
    b.done(&["disk", "create", "vm", "--size", "16M"]);
    b.write("vm", 0, &pattern::bytes(1, 0, 64));
    b.done(&["disk", "fork", "vm", "child"]);
    b.done(&["disk", "rm", "vm"]);
    let before = b.read("child");

    std::fs::remove_file(b.store.store().join("catalogue.redb")).unwrap();
    b.done(&["store", "rebuild"]);

    assert_eq!(b.json(&["disk", "ls"]).as_array().unwrap().len(), 1, "the parent is gone for good");
    assert!(b.read("child") == before);
    b.done(&["disk", "rm", "child"]);
    assert_eq!(b.segments(), 0);
}
