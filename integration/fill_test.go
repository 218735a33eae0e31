package integration

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestFillOutlives: a container of which little was read goes on when its registry is gone, and others start, if the rest of the image was fetched behind; also if
// the daemon that begins with that is another one than the one that mounted it. Its layers are verified by that, and nothing is fetched twice.
func TestFillOutlives(t *testing.T) {
	needRoot(t)
	var away atomic.Bool
	registry := NewRegistry(t, RegistryOptions{Wrap: func(next http.Handler) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
			if away.Load() {
				http.Error(w, "away", http.StatusServiceUnavailable)
				return
			}
			next.ServeHTTP(w, q)
		})
	}})
	layout, sums := pieces(t, 3)
	image := registry.Push(t, layout, "fill")
	n := startNode(t, daemonOptions{More: "read_timeout = \"1s\"\n"}, containerdOptions{})
	must(t, n.pull(image))
	n.sleeper(t, image, "a")
	n.reads(t, "a", 0, sums[0])
	if here, all := n.daemon.here(t); here >= all {
		t.Fatalf("%d bytes of %d are here before anything was filled: the test shows nothing", here, all)
	}
	_, started := registry.Traffic()

	config := n.daemon.Dir + "/config.toml"
	b, err := os.ReadFile(config)
	must(t, err)
	must(t, os.WriteFile(config, []byte(strings.NewReplacer(`fill = "off"`, `fill = "on"`, "verify = false", "verify = true").Replace(string(b))), 0o644))
	n.daemon.stop(t)
	n.daemon.start(t)
	unverified := func() (sum int) {
		list, err := filepath.Glob(n.daemon.Root + "/snapshots/*/layer.json")
		must(t, err)
		for _, name := range list {
			if b, err := os.ReadFile(name); err != nil || !strings.Contains(string(b), `"verified": true`) {
				sum++
			}
		}
		return sum
	}
	here, all := n.daemon.here(t)
	// The first piece was all of its layer, which is verified by itself, within half a minute.
	for end := time.Now().Add(patience); here < all || unverified() > 1; here, all = n.daemon.here(t) {
		if time.Now().After(end) {
			t.Fatalf("%d bytes of %d are here, layers not verified: %d", here, all, unverified())
		}
		time.Sleep(20 * time.Millisecond)
	}
	_, manifest, _ := readLayout(t, layout)
	var size int64
	for _, l := range manifest.Layers {
		size += l.Size
	}
	if _, bytes := registry.Traffic(); bytes-started > size*105/100 {
		t.Errorf("%d bytes of blobs of %d were fetched for the rest, after %d", bytes-started, size, started)
	}
	away.Store(true)
	for i, sum := range sums {
		n.reads(t, "a", i, sum)
	}
	n.sleeper(t, image, "b")
	for i, sum := range sums {
		n.reads(t, "b", i, sum)
	}
	for _, id := range []string{"a", "b"} {
		n.mustCtr(t, "task", "delete", "--force", id)
		n.mustCtr(t, "container", "delete", id)
	}
}

// here returns how many bytes of the one image are in the store, and how many it has.
func (d *Daemon) here(t testing.TB) (here, all int64) {
	t.Helper()
	out, err := d.lazuli("status", "--json")
	must(t, err)
	var s struct {
		Images []struct{ Bytes, BytesHere int64 } `json:"images"`
	}
	must(t, json.Unmarshal([]byte(out), &s))
	if len(s.Images) != 1 {
		t.Fatalf("%d images: %s", len(s.Images), out)
	}
	return s.Images[0].BytesHere, s.Images[0].Bytes
}
