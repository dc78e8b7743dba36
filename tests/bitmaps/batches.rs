//! What batches do: one instant, all or nothing, exact counts.

use crate::rig::*;
use crate::steps::*;
use fleecefs::fleece::Action;

#[test]
fn bitmaps_record_writes_zeroes_and_discards() {
    let host = Host::one();
    let fleece = host.mount();
    let disk = fleece.disk("a").unwrap();
    apply(&fleece, &[add("a/x"), added("a/fine", Some(512), false, false), added("a/off", Some(GRANULE), true, true)]);
    touch(&fleece, "a", &[0]);
    disk.write_zeroes(GRANULE, 512).unwrap();
    disk.discard(2 * GRANULE, GRANULE).unwrap();
    disk.write(&[1; 2], 4 * GRANULE - 1).unwrap();
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[0, 1, 2, 3, 4]));
    assert_eq!(count(&fleece, "a/fine"), 512 + 512 + GRANULE + 2 * 512);
    assert_eq!(count(&fleece, "a/off"), 0);
    disk.write(&[1], DISK_BYTES - 1).unwrap();
    assert_eq!(count(&fleece, "a/x"), 6 * GRANULE, "the last granule counts as a whole");
}

#[test]
fn clear_enable_and_disable_do_what_they_say() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x")]);
    touch(&fleece, "a", &[1]);
    apply(&fleece, &[disable("a/x")]);
    touch(&fleece, "a", &[2]);
    assert_eq!((hash(&fleece, "a/x"), info(&fleece, "a/x").recording), (hash_of(&[1]), false));
    apply(&fleece, &[disable("a/x"), enable("a/x"), enable("a/x")]);
    touch(&fleece, "a", &[3]);
    assert_eq!((hash(&fleece, "a/x"), info(&fleece, "a/x").recording), (hash_of(&[1, 3]), true));
    apply(&fleece, &[clear("a/x")]);
    touch(&fleece, "a", &[5]);
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[5]));
    apply(&fleece, &[disable("a/x"), clear("a/x")]);
    touch(&fleece, "a", &[5]);
    assert_eq!(count(&fleece, "a/x"), 0);
}

#[test]
fn steps_see_what_the_steps_before_them_did() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), transient("b/y")]);
    touch(&fleece, "a", &[1]);
    touch(&fleece, "b", &[2]);
    apply(
        &fleece,
        &[
            add("a/first"),
            merge("a/first", &["a/x", "b/y"]),
            clear("a/x"),
            added("b/second", Some(GRANULE), true, true),
            merge("b/second", &["a/x", "b/y"]),
            merge("a/x", &["a/first"]),
            add("a/gone"),
            remove("a/gone"),
        ],
    );
    touch(&fleece, "a", &[4]);
    assert_eq!(hash(&fleece, "a/first"), hash_of(&[1, 2, 4]));
    assert_eq!(hash(&fleece, "b/second"), hash_of(&[2]));
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[1, 2, 4]));
    assert_eq!(names(&fleece, "a"), ["first", "x"]);
}

#[test]
fn steps_that_undo_each_other_cost_no_bit() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), add("a/y")]);
    touch(&fleece, "a", &[1]);
    apply(&fleece, &[disable("a/y")]);
    touch(&fleece, "a", &[2]);
    apply(&fleece, &[disable("a/x"), enable("a/x"), enable("a/y"), disable("a/y")]);
    touch(&fleece, "a", &[3]);
    assert_eq!([hash(&fleece, "a/x"), hash(&fleece, "a/y")], [hash_of(&[1, 2, 3]), hash_of(&[1])]);
}

#[test]
fn granularities_may_differ_and_round_to_dirty() {
    let host = Host::one();
    let fleece = host.mount();
    let new = |name: &str, granularity| added(name, Some(granularity), true, true);
    apply(&fleece, &[added("a/fine", Some(4096), true, false)]);
    fleece.disk("a").unwrap().write(&[1], GRANULE + 4096).unwrap();
    let steps = [
        new("a/coarse", 2 * GRANULE),
        merge("a/coarse", &["a/fine"]),
        new("a/back", 4096),
        merge("a/back", &["a/coarse"]),
    ];
    apply(&fleece, &steps);
    assert_eq!(count(&fleece, "a/coarse"), 2 * GRANULE);
    assert_eq!(count(&fleece, "a/back"), 2 * GRANULE);
    assert_eq!(count(&fleece, "a/fine"), 4096);
}

#[test]
fn a_merged_bitmap_equals_one_that_recorded_throughout() {
    let host = Host::one();
    let fleece = host.mount();
    apply(&fleece, &[add("a/all"), add("a/part0")]);
    for round in 0..6u64 {
        touch(&fleece, "a", &[round]);
        let (now, next) = (format!("a/part{round}"), format!("a/part{}", round + 1));
        apply(&fleece, &[disable(&now), add(&next)]);
    }
    let parts: Vec<String> = (0..6).map(|round| format!("a/part{round}")).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    apply(&fleece, &[add("a/sum"), merge("a/sum", &parts)]);
    assert_eq!(hash(&fleece, "a/sum"), hash(&fleece, "a/all"));
    assert_eq!(hash(&fleece, "a/part3"), hash_of(&[3]));
}

#[test]
fn a_batch_that_fails_at_any_step_changes_nothing() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/x"), transient("a/t"), add("b/y"), added("b/off", Some(GRANULE), true, true)]);
    touch(&fleece, "a", &[1]);
    touch(&fleece, "b", &[2]);
    let steps = [
        add("a/new"),
        clear("a/x"),
        merge("a/new", &["b/y", "a/t"]),
        disable("a/t"),
        enable("b/off"),
        merge("b/off", &["a/new"]),
        hold("b/y"),
        snapshot("s"),
        remove("a/x"),
    ];
    let before = state(&fleece);
    for at in 0..=steps.len() {
        for bad in [Action::Abort, merge("a/new2", &["a/x"])] {
            let mut batch = steps.to_vec();
            batch.insert(at, bad);
            assert_eq!(refused(&fleece, &batch).index, at);
            assert_eq!(state(&fleece), before, "step {at}");
            assert!(fleece.snapshots().is_empty());
        }
    }
    touch(&fleece, "a", &[3]);
    assert_eq!(hash(&fleece, "a/x"), hash_of(&[1, 3]));
    let applied = apply(&fleece, &steps);
    assert_eq!((applied.holds.len(), fleece.snapshots().len()), (1, 1));
    assert_eq!(names(&fleece, "a").len(), 3, "s, new, t");
}

#[test]
fn a_snapshot_and_bitmaps_change_at_the_same_instant() {
    let host = Host::pair();
    let fleece = host.mount();
    apply(&fleece, &[add("a/since"), transient("b/since")]);
    touch(&fleece, "a", &[1]);
    let applied =
        apply(&fleece, &[snapshot("s"), clear("a/since"), add("a/twin"), clear("b/since"), disable("b/since")]);
    assert_eq!(applied.snapshot.unwrap().name(), "s");
    touch(&fleece, "a", &[2]);
    touch(&fleece, "b", &[2]);
    assert_eq!(hash(&fleece, "a/since"), hash(&fleece, "a/s"));
    assert_eq!(hash(&fleece, "a/twin"), hash(&fleece, "a/s"));
    assert_eq!(count(&fleece, "b/since"), 0);
    let before = read_view(&view_of(&fleece, "s", "a"), 2 * GRANULE, 100).unwrap();
    assert!(is_zero(&before));
    fleece.complete_snapshot("s", None).unwrap();
    apply(&fleece, &[snapshot("t"), merge("a/since", &["a/s", "a/t"])]);
    assert_eq!((hash(&fleece, "a/since"), count(&fleece, "a/t")), (hash_of(&[2]), 0));
}

#[test]
fn growth_is_clean_in_users_bitmaps_and_what_is_cut_off_does_not_come_back() {
    for reopen in [false, true] {
        let host = Host::one();
        let mut fleece = host.mount();
        apply(&fleece, &[add("a/on"), add("a/off")]);
        freeze(&fleece, "s");
        fleece.complete_snapshot("s", None).unwrap();
        fleece.reap();
        touch(&fleece, "a", &[1, 5]);
        apply(&fleece, &[disable("a/off")]);
        let again = |fleece: &mut std::sync::Arc<fleecefs::fleece::Fleece>| {
            if reopen {
                fleece.close().unwrap();
                *fleece = host.mount();
            }
        };
        fleece.resize_disk("a", 10 * GRANULE).unwrap();
        again(&mut fleece);
        assert_eq!((hash(&fleece, "a/on"), hash(&fleece, "a/off")), (hash_of(&[1, 5]), hash_of(&[1, 5])));
        assert_eq!(hash(&fleece, "a/s"), hash_of(&[1, 5, 6, 7, 8, 9]), "a checkpoint's growth is dirty");
        touch(&fleece, "a", &[9]);
        fleece.resize_disk("a", 3 * GRANULE).unwrap();
        again(&mut fleece);
        fleece.resize_disk("a", 11 * GRANULE).unwrap();
        again(&mut fleece);
        assert_eq!((hash(&fleece, "a/on"), hash(&fleece, "a/off")), (hash_of(&[1]), hash_of(&[1])));
        apply(&fleece, &[merge("a/on", &["a/off"])]);
        touch(&fleece, "a", &[10]);
        assert_eq!(hash(&fleece, "a/on"), hash_of(&[1, 10]));
    }
}
