package integration

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// TestFillOutlives: a container of which little was read goes on when its registry is gone, if the rest of the image was fetched behind; also if
// the daemon that begins with that is another one than the one that mounted it. Nothing is fetched twice.
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

	config := n.daemon.Dir + "/config.toml"
	b, err := os.ReadFile(config)
	must(t, err)
	must(t, os.WriteFile(config, []byte(strings.Replace(string(b), `fill = "off"`, `fill = "on"`, 1)), 0o644))
	n.daemon.stop(t)
	n.daemon.start(t)
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		here, all := n.daemon.here(t)
		if here == all {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("%d bytes of %d are here", here, all)
		}
	}
	away.Store(true)
	for i, sum := range sums {
		n.reads(t, "a", i, sum)
	}
	n.mustCtr(t, "task", "delete", "--force", "a")
	n.mustCtr(t, "container", "delete", "a")
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
