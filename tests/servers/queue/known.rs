//! Producers ask collectors which jobs have their line.

use async_nats::Client;
use futures_util::StreamExt;
use shared::queue::nats::{FleetError, MAX_ASKED};
use shared::status::Known;
use shared::{IdDigest, JobId};

use super::*;
use flotilla_tests::outsider::settle;

/// Long enough for an answer, short enough to wait for none.
const SHORT: Duration = Duration::from_millis(300);

fn digests(count: usize) -> Vec<IdDigest> {
    (0..count).map(|number| JobId(format!("q{number}")).digest()).collect()
}

fn run() -> RunId {
    RunId("run.1 é".into())
}

async fn stranger(server: &NatsServer) -> Client {
    async_nats::connect(server.url()).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn collector_tells_which_jobs_have_their_line() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let questions = fleet.serve_known(&run()).await.unwrap();
    let answering = tokio::spawn(questions.for_each_concurrent(4, async |question| {
        let written: Vec<bool> = question.ids.iter().map(|id| id.0[0] % 3 == 0).collect();
        let known = Known { num_lines: 7, written };
        // About a single one it refuses.
        let is_told = question.ids.len() > 1;
        question.reply(is_told.then_some(&known)).await.unwrap();
    }));
    let producer = Fleet::connect(&config(server.url())).await.unwrap();
    for count in [2, 9, MAX_ASKED] {
        let ids = digests(count);
        let known = producer.request_known(&run(), &ids, LONG).await.unwrap();
        assert_eq!(known.num_lines, 7);
        let expected: Vec<bool> = ids.iter().map(|id| id.0[0] % 3 == 0).collect();
        assert_eq!(known.written, expected);
    }
    let refused = producer.request_known(&run(), &digests(1), LONG).await;
    assert!(matches!(refused, Err(FleetError::Server { .. })), "{refused:?}");
    // Another run has no collector.
    let nobody = producer.request_known(&RunId("run".into()), &digests(2), LONG).await;
    assert!(matches!(nobody, Err(FleetError::NoCollector { .. })), "{nobody:?}");
    answering.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_refused_and_keeps_nobody_from_asking() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let mut questions = Box::pin(fleet.serve_known(&run()).await.unwrap());
    let answering = tokio::spawn(async move {
        let question = questions.next().await.unwrap();
        let written = vec![true; question.ids.len()];
        question.reply(Some(&Known { num_lines: 3, written })).await.unwrap();
    });
    let stranger = stranger(&server).await;
    let subject = "flotilla.known.run=2E1=20=C3=A9";
    for garbage in [vec![], b"garbage".to_vec(), vec![0; 17], vec![0; 16 * (MAX_ASKED + 1)]] {
        let length = garbage.len();
        let reply = stranger.request(subject, garbage.clone().into()).await.unwrap();
        assert!(reply.payload.is_empty(), "an answer to {length} bytes of garbage");
        // Nobody waits for this one's reply.
        stranger.publish(subject, garbage.into()).await.unwrap();
    }
    let known = fleet.request_known(&run(), &digests(3), LONG).await.unwrap();
    assert_eq!(known.written, [true; 3]);
    answering.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_is_none_or_late_is_an_error() {
    let server = NatsServer::start();
    let fleet = fleet(&server).await;
    let stranger = stranger(&server).await;
    let mut asked = stranger.subscribe("flotilla.known.run=2E1=20=C3=A9").await.unwrap();
    settle(&stranger).await;
    for garbage in ["", "garbage", "a text that is much longer than a reply can be"] {
        let ids = digests(3);
        let run = run();
        let (asking, ()) = tokio::join!(fleet.request_known(&run, &ids, LONG), async {
            let reply = asked.next().await.unwrap().reply.unwrap();
            stranger.publish(reply, garbage.into()).await.unwrap();
        });
        assert!(matches!(asking, Err(FleetError::Server { .. })), "{garbage}: {asking:?}");
    }
    let late = fleet.request_known(&run(), &digests(3), SHORT).await;
    assert!(matches!(late, Err(FleetError::Server { .. })), "{late:?}");
}
