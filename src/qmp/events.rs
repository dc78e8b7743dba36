//! Events: to every connection that has negotiated, in QMP's form, without ever waiting.

use super::codec::encode;
use super::outbox::Outbox;
use crate::backup::jobs::{JobEvent, JobInfo};
use crate::fleece::Event;
use parking_lot::Mutex;
use serde_json::{Value, json};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

/// Who listens. Lives longer than the server: the core tells events before the socket answers.
#[derive(Debug, Default)]
pub struct Events {
    /// Leaf lock, held for the queueing of one event.
    listeners: Mutex<Vec<Weak<Outbox>>>,
}

impl Events {
    /// Adds a connection; it leaves by being dropped.
    pub fn listen(&self, outbox: &Arc<Outbox>) {
        let mut listeners = self.listeners.lock();
        listeners.retain(|l| l.strong_count() > 0);
        listeners.push(Arc::downgrade(outbox));
    }

    /// Queues an event for every listener.
    pub fn emit(&self, name: &str, data: &Value) {
        let listeners = self.listeners.lock();
        if listeners.is_empty() {
            return;
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let bytes: Arc<[u8]> = encode(&json!({
            "event": name,
            "data": data,
            "timestamp": { "seconds": now.as_secs(), "microseconds": now.subsec_micros() },
        }))
        .into();
        for outbox in listeners.iter().filter_map(Weak::upgrade) {
            outbox.push_event(bytes.clone());
        }
    }

    /// Queues an event of the core: `view-broken` of `disk` becomes `FLEECEFS_VIEW_BROKEN` with the rest as data.
    pub fn emit_core(&self, event: &Event) {
        let (name, data) = core_event(event);
        self.emit(&name, &data);
    }

    /// Queues what happened to a job, in QEMU's form.
    pub fn emit_job(&self, event: &JobEvent) {
        let (name, data) = job_event(event);
        self.emit(name, &data);
    }
}

fn job_event(event: &JobEvent) -> (&'static str, Value) {
    let ended = |info: &JobInfo| {
        let (current, total, speed) = (info.current, info.total, info.speed);
        json!({ "type": info.kind, "device": info.id, "len": total, "offset": current, "speed": speed })
    };
    match event {
        JobEvent::Status(id, status) => ("JOB_STATUS_CHANGE", json!({ "id": id, "status": status.name() })),
        JobEvent::Pending(info) => ("BLOCK_JOB_PENDING", json!({ "type": info.kind, "id": info.id })),
        JobEvent::Cancelled(info) => ("BLOCK_JOB_CANCELLED", ended(info)),
        JobEvent::Completed(info) => {
            let mut data = ended(info);
            if let Some(error) = &info.error {
                data["error"] = json!(error);
            }
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Error { id, operation, action } => {
            ("BLOCK_JOB_ERROR", json!({ "device": id, "operation": operation, "action": action }))
        }
    }
}

/// Name and data of an event of the core, by its serde form, so that a new kind needs no change here.
fn core_event(event: &Event) -> (String, Value) {
    let mut data = serde_json::to_value(event).unwrap_or_default();
    let kind = data.as_object_mut().and_then(|members| members.remove("kind"));
    let kind = kind.as_ref().and_then(Value::as_str).unwrap_or("event");
    (format!("FLEECEFS_{}", kind.to_ascii_uppercase().replace('-', "_")), data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_events_have_qemu_style_names() {
        let event = Event::StoreNearlyFull { disk: "vda".into(), used: 8, limit: 10 };
        let (name, data) = core_event(&event);
        assert_eq!(name, "FLEECEFS_STORE_NEARLY_FULL");
        assert_eq!(data, json!({"disk": "vda", "used": 8, "limit": 10}));
        assert_eq!(core_event(&Event::ViewBroken { disk: "a".into(), reason: "b".into() }).0, "FLEECEFS_VIEW_BROKEN");
    }

    #[test]
    fn events_reach_listeners_with_a_timestamp() {
        let events = Events::default();
        let outbox = Arc::new(Outbox::new(Box::new(|| {})));
        events.emit("EARLY", &json!({}));
        events.listen(&outbox);
        events.emit("SHUTDOWN", &json!({"guest": false}));
        outbox.finish();
        let bytes = outbox.pop().unwrap();
        let event: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(event["event"], "SHUTDOWN");
        assert!(event["timestamp"]["seconds"].as_u64().unwrap() > 1_600_000_000);
        assert!(event["timestamp"]["microseconds"].as_u64().unwrap() < 1_000_000);
        assert!(outbox.pop().is_none());
    }
}
