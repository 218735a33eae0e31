package rootfs

import (
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// TestMakeRun: a folder that is being made is not taken for a dead process's by another that sweeps.
func TestMakeRun(t *testing.T) {
	n := &Node{root: t.TempDir(), log: slog.New(slog.DiscardHandler)}
	stop := make(chan struct{})
	var sweeping sync.WaitGroup
	sweeping.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				n.sweep()
			}
		}
	})
	dir := filepath.Join(n.root, "run", "1.1")
	for range 200 {
		lock, err := makeRun(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "lock")); err != nil {
			t.Fatalf("the folder was swept while its process lives: %v", err)
		}
		if err := removeRun(dir); err != nil {
			t.Fatal(err)
		}
		lock.Close()
	}
	close(stop)
	sweeping.Wait()
}
