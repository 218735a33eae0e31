package daemon

import (
	"context"
	"net/http"
	"path"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
)

// metrics are what Prometheus may ask. No label has an image, a layer or a path as its value: their number must not
// grow with what a node runs.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.HistogramVec
}

func newMetrics(s *server) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "lazuli_snapshots_call_seconds",
			Help: "How long containerd's calls took, by method and status.",
			// From an answer out of the database to a layer's table over a slow link.
			Buckets: []float64{.001, .005, .02, .05, .1, .25, .5, 1, 2.5, 5, 15, 60},
		}, []string{"method", "code"}),
	}
	m.registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), m.calls)
	counter := func(name, help string, f func() int64) {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, func() float64 { return float64(f()) }))
	}
	counter("lazuli_fetch_requests_total", "Range requests begun, retries included.", func() int64 { return s.node.QueueStats().Requests })
	counter("lazuli_fetch_bytes_total", "Bytes of blobs that arrived.", func() int64 { return s.node.QueueStats().Fetched })
	counter("lazuli_read_bytes_needed_total", "Bytes of files that readers waited for.", func() int64 { return s.node.QueueStats().Needed })
	counter("lazuli_read_misses_total", "Reads that waited for the network.", func() int64 { return s.node.QueueStats().Misses })
	counter("lazuli_read_errors_total", "Reads that failed.", func() int64 { return s.node.QueueStats().Errors })
	m.registry.MustRegister(newReadLatency(s), prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "lazuli_user_mounts", Help: "Images that users mounted through the daemon.",
	}, func() float64 { return float64(len(s.mounts.list())) }))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{})
}

// call measures a call of the snapshots service.
func (m *metrics) call(ctx context.Context, req any, method *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	begun := time.Now()
	resp, err := next(ctx, req)
	m.calls.WithLabelValues(path.Base(method.FullMethod), status.Code(err).String()).Observe(time.Since(begun).Seconds())
	return resp, err
}

// readLatency is the histogram of how long reads waited, which the fetcher counts by itself.
type readLatency struct {
	s    *server
	desc *prometheus.Desc
}

func newReadLatency(s *server) *readLatency {
	return &readLatency{s, prometheus.NewDesc("lazuli_read_wait_seconds", "How long reads waited for the network.", nil, nil)}
}

func (r *readLatency) Describe(c chan<- *prometheus.Desc) { c <- r.desc }

func (r *readLatency) Collect(c chan<- prometheus.Metric) {
	if r.s.node == nil {
		return
	}
	w := r.s.node.Waits()
	buckets := map[float64]uint64{}
	sum := uint64(0)
	for i, bound := range w.Bounds {
		sum += uint64(w.Counts[i])
		buckets[bound.Seconds()] = sum
	}
	c <- prometheus.MustNewConstHistogram(r.desc, uint64(w.Total), w.Sum.Seconds(), buckets)
}
