package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"lazuli/convert"
	"lazuli/fs/rootfs"
)

const (
	learnFiles = 300       // of the image
	learnStep  = 10        // the job reads each tenth
	learnSize  = 100 << 10 // of a file
	// learnMisses is how many reads of a cold start wait at least: windows have 4 MiB at most.
	learnMisses = learnFiles*learnSize/(4<<20) - 1
)

// learnImage makes a version of an image of files that do not compress. version changes 2 % of them: half of those are read by the job.
func learnImage(t testing.TB, version int) (layout string) {
	t.Helper()
	return convertLayout(t, runnableLayout(t, nil, tarLayer(t, func(add func(tar.Header, []byte)) {
		add(tar.Header{Name: "data/", Typeflag: tar.TypeDir, Mode: 0o755}, nil)
		for i := range learnFiles {
			seed := i
			if i%100 == 0 || i%100 == 1 {
				seed += 1000 * version
			}
			add(tar.Header{Name: fmt.Sprintf("data/%d", i), Typeflag: tar.TypeReg, Mode: 0o644}, noise(uint64(seed), learnSize+version))
		}
	})), convert.Options{})
}

// learnScript reads some of the files.
var learnScript = []string{"sh", "-c", fmt.Sprintf(`i=0; while [ $i -lt %d ]; do cat /data/$i; i=$((i+%d)); done | sha256sum`, learnFiles, learnStep)}

// misses returns how many reads of the daemon have waited for the network since its server began.
func (d *Daemon) misses(t testing.TB) int {
	t.Helper()
	out, err := d.get("/v1/status")
	must(t, err)
	var status struct {
		Fetched struct{ Misses int } `json:"fetched"`
	}
	must(t, json.Unmarshal([]byte(out), &status))
	return status.Fetched.Misses
}

// logs waits until the daemon has logged a line with a text n times, and returns the last one.
func (d *Daemon) logs(t testing.TB, text string, n int) string {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		b, err := os.ReadFile(d.Dir + "/log")
		must(t, err)
		var lines []string
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, text) {
				lines = append(lines, line)
			}
		}
		if len(lines) >= n {
			return lines[n-1]
		}
		if time.Now().After(end) {
			t.Fatalf("the daemon has logged %q %d times and not %d", text, len(lines), n)
		}
	}
}

// start pulls an image, waits for a line of the daemon's log if there is one, and returns how many reads of the job waited for the network.
func (n *node) startJob(t testing.TB, image, id, until string, times int) (misses int) {
	t.Helper()
	must(t, n.pull(image))
	if until != "" {
		n.daemon.logs(t, until, times)
	}
	before := n.daemon.misses(t)
	_, err := n.run(image, id, nil, learnScript...)
	must(t, err)
	return n.daemon.misses(t) - before
}

// empty removes an image and all that is in the store.
func (n *node) empty(t testing.TB, before []string, image string) {
	t.Helper()
	n.mustCtr(t, "image", "delete", "--sync", image)
	n.settle(t, before)
	_, err := n.daemon.lazuli("prune")
	must(t, err)
	left, err := filepath.Glob(n.daemon.Root + "/store/objects/*/*")
	must(t, err)
	if len(left) > 0 {
		t.Fatalf("%d objects are left", len(left))
	}
}

// TestLearn: what the start of an image that nobody profiled has read is fetched ahead for the next build of the image, which has changed, on
// the same node; and a node that shares puts a pack beside the image that another one uses.
func TestLearn(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	first := registry.Push(t, learnImage(t, 0), "job")
	n := startNode(t, daemonOptions{More: "log_level = \"debug\"\nshare = true\n"}, containerdOptions{})
	before := n.traces()

	cold := n.startJob(t, first, "a", "", 0)
	if cold < learnMisses {
		t.Fatalf("%d reads of a cold start have waited: the test shows nothing", cold)
	}
	n.daemon.logs(t, "a startup pack was put beside the image", 1)
	learned, err := filepath.Glob(n.daemon.Root + "/profiles/*.profile")
	must(t, err)
	if len(learned) != 1 {
		t.Fatalf("profiles: %v", learned)
	}

	t.Run("next", func(t *testing.T) {
		n.empty(t, before, first)
		second := registry.Push(t, learnImage(t, 1), "job") // the tag moves, and there is no pack
		registry.Reset()
		misses := n.startJob(t, second, "b", "fetched ahead what a start wants", 1)
		if misses > learnMisses/3 {
			t.Errorf("%d reads have waited, %d of the first build did", misses, cold)
		}
		_, sent := blobTraffic(registry)
		if need := int64(learnFiles / learnStep * learnSize); sent > 3*need {
			t.Errorf("%d bytes were fetched for %d", sent, need)
		}
		n.empty(t, before, second)
	})
	t.Run("other node", func(t *testing.T) {
		image := registry.Push(t, learnImage(t, 0), "job")
		other := startNode(t, daemonOptions{More: "log_level = \"debug\"\nshare = true\n"}, containerdOptions{})
		registry.Reset()
		if misses := other.startJob(t, image, "c", `msg="startup pack"`, 1); misses > learnMisses/3 {
			t.Errorf("%d reads have waited, %d without a pack did", misses, cold)
		}
		for _, q := range registry.Log() {
			if q.Method != http.MethodGet && q.Method != http.MethodHead {
				t.Errorf("a pack that lacks nothing was made again: %+v", q)
			}
		}
	})
	t.Run("verbs", func(t *testing.T) {
		image := registry.Push(t, learnImage(t, 1), "job")
		out, err := n.daemon.lazuli("profile", "show", "--json", image)
		must(t, err)
		var shown []struct {
			Repository string
			Starts     int
			Files      []struct {
				Path   string
				Pieces []int
			}
		}
		must(t, json.Unmarshal([]byte(out), &shown))
		read := map[string]bool{}
		if len(shown) != 1 || shown[0].Repository != registry.Addr+"/job" || shown[0].Starts == 0 {
			t.Fatalf("%s", out)
		}
		for _, f := range shown[0].Files {
			read[f.Path] = len(f.Pieces) > 0
		}
		if !read["data/10"] || !read["data/290"] || !read["bin/busybox"] || read["data/15"] {
			t.Errorf("what was read: %v", read)
		}
		if out, err = n.daemon.lazuli("profile", "show", learned[0]); err != nil || !strings.Contains(out, " data/10\n") || !strings.Contains(out, " 0-1 ") {
			t.Errorf("%v\n%s", err, out)
		}
		merged := filepath.Join(t.TempDir(), "merged")
		_, err = n.daemon.lazuli("profile", "merge", "-o", merged, learned[0], learned[0])
		must(t, err)
		_, err = n.daemon.lazuli("profile", "push", "--profile", merged, image)
		must(t, err)
		out, err = n.daemon.lazuli("profile", "push", image)
		if err != nil || !strings.HasPrefix(out, "sha256:") {
			t.Errorf("%v\n%s", err, out)
		}
		if _, err := n.daemon.lazuli("profile", "push", image+"-of-another"); err == nil {
			t.Error("pushed a pack for an image that is not there")
		}
	})
}

// TestLearnMount: the same without containerd and without a daemon, by a process of its own for each start.
func TestLearnMount(t *testing.T) {
	needRoot(t)
	registry := NewRegistry(t, RegistryOptions{})
	root := t.TempDir()
	// start reads what the job reads, from an empty store, and returns how many reads have waited.
	start := func(version int, await bool, o rootfs.Options) int64 {
		t.Helper()
		must(t, os.RemoveAll(root+"/store"))
		must(t, os.RemoveAll(root+"/images"))
		ref := registry.Push(t, learnImage(t, version), "job")
		n, err := rootfs.Open(root, o)
		must(t, err)
		defer func() { must(t, n.Close()) }()
		r, err := n.Mount(t.Context(), parse(t, ref), "", rootfs.MountOptions{})
		must(t, err)
		defer func() { must(t, r.Close()) }()
		for end := time.Now().Add(patience); await; time.Sleep(5 * time.Millisecond) {
			here, err := filepath.Glob(root + "/store/objects/*/*")
			must(t, err)
			if len(here) >= learnFiles/learnStep {
				break
			}
			if time.Now().After(end) {
				t.Fatalf("%d objects are here after %v", len(here), patience)
			}
		}
		before := n.QueueStats().Misses
		for i := 0; i < learnFiles; i += learnStep {
			_, err := os.ReadFile(fmt.Sprintf("%s/data/%d", r.Dir, i))
			must(t, err)
		}
		return n.QueueStats().Misses - before
	}
	if got := start(0, false, rootfs.Options{Unlearned: true}); got < learnMisses {
		t.Fatalf("%d reads of a cold start have waited: the test shows nothing", got)
	}
	if learned, err := filepath.Glob(root + "/profiles/*"); err != nil || len(learned) > 0 {
		t.Errorf("learned although it was not to be: %v, %v", learned, err)
	}
	lessons := 0
	start(0, false, rootfs.Options{Learned: func(_ context.Context, l rootfs.Lesson) { lessons += len(l.Learned.Profile.Pieces) }})
	if want := learnFiles / learnStep * 2; lessons != want { // two pieces each
		t.Errorf("%d pieces were learned, want %d", lessons, want)
	}
	if got := start(1, true, rootfs.Options{}); got > 0 {
		t.Errorf("%d reads have waited", got)
	}
}
